"""What the buttons of the page do, without the page."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event, Lock

import torch
from PIL import Image

from hydra_hf.data.prompts import PROMPTS
from hydra_hf.modeling.flow import predict_clean
from hydra_hf.pipelines.answering import answer
from hydra_hf.pipelines.painting import paint
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline
from hydra_hf.pipelines.pipeline_hydra_reconstruction import HydraReconstructionPipeline


Shown = Image.Image | list[Image.Image] | None  # a picture, the frames of a clip, or nothing yet


class Actions:
    """One model for all visitors, one of whom it serves at a time: a pipeline keeps the state of its call."""

    def __init__(self, pipeline: HydraPipeline):
        self.pipeline = pipeline
        self.lock = Lock()

    def draw(self, prompt: str, seed: int, **options) -> Iterator[tuple[int, Shown]]:
        """After each denoising step its number and the picture that the model expects by then; after the last one, the picture or
        clip itself, the same as `HydraPipeline` gives for this seed. A reader who leaves stops the drawing.

        Nothing comes twice: Gradio would write the file of the picture anew while a browser still reads it.

        Args:
            options: of `HydraPipeline`, such as `image` for an edit and `num_frames` for a clip, which is not shown before its
                end.
        """
        steps, has_left, before = SimpleQueue(), Event(), []

        def show(pipeline, step, timestep, tensors):
            pipeline._interrupt = has_left.is_set()
            if step + 1 == pipeline.num_timesteps:
                return
            before[:] = [*before[-1:], tensors["latents"]]
            picture = None
            if len(before) == 2 and "num_frames" not in options:
                picture = self._expected(*before, *pipeline.scheduler.sigmas[step : step + 2], seed)
            steps.put((step + 1, picture))

        def run() -> tuple[int, Shown]:
            generator = torch.Generator().manual_seed(seed)
            with self.lock:
                (drawn,) = self.pipeline(
                    prompt, generator=generator, callback_on_step_end=show, return_dict=False, **options
                )
                return self.pipeline.num_timesteps, drawn[0]

        worker = ThreadPoolExecutor(1)
        drawing = worker.submit(run)
        drawing.add_done_callback(lambda _: steps.put(None))
        try:
            yield from iter(steps.get, None)
            yield drawing.result()
        finally:
            has_left.set()
            worker.shutdown(wait=False)

    def _expected(self, latents, next_latents, sigma, next_sigma, seed: int) -> Image.Image:
        """The picture to which the step from `latents` to `next_latents` leads if it is continued in a straight line."""
        velocity = (next_latents - latents) / (next_sigma - sigma)
        clean = predict_clean(latents, velocity, sigma[None])
        return self.pipeline.decode(clean, generator=torch.Generator().manual_seed(seed))[0]

    def ask(self, visual: Image.Image | str, question: str) -> str:
        """The answer to a question about an image, or about the clip in a file."""
        with self.lock:
            return answer(self.pipeline.model, self.pipeline.processor, [visual], [question])[0]

    def rebuild(self, image: Image.Image, seed: int = 0) -> Image.Image:
        """What the tokenizer keeps of an image: encoded and decoded again."""
        reconstruction = HydraReconstructionPipeline(
            self.pipeline.model.model.vision_tower, self.pipeline.processor.image_processor
        )
        with self.lock:
            return reconstruction(image, generator=torch.Generator().manual_seed(seed)).images[0]

    def paint(self, image: Image.Image, tasks: list[str], seed: int = 0) -> list[Image.Image]:
        """What the model paints of an image for each task of `PROMPTS`, such as "depth"."""
        pipeline = self.pipeline
        with self.lock:
            painted = paint(
                pipeline.model,
                pipeline.processor,
                [image] * len(tasks),
                [PROMPTS[task][0] for task in tasks],
                num_inference_steps=pipeline.config.default_num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
            )
        return pipeline.image_processor.postprocess(torch.stack(painted).float(), output_type="pil")
