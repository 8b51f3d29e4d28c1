"""The page, in Gradio: one picture, drawn or uploaded, and a tab for each thing that the model can do with it."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from hydra_hf.files import write_video
from hydra_hf.pipelines.pipeline_hydra import HydraPipeline

from .abilities import PICTURES, examples_of, find_tasks, read_tags
from .actions import Actions


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("The page needs gradio: pip install hydra_hf[demo]") from error


FPS = 8
COLUMN = 320  # pixels: two columns side by side on a desktop, one below the other on a phone
CACHE_SECONDS = 3600  # pictures of visitors are deleted after this
STYLE = """
.fill img, .fill video {width: 100%; height: 100%; object-fit: contain}
.fill video {height: 240px}
footer {display: none !important}
@media (max-width: 640px) {
  main {padding-left: 12px !important; padding-right: 12px !important}
  .tab-container button {padding: 0 8px !important}
}
"""


def launch(pipeline: HydraPipeline, model: str, host: str | None = None, port: int | None = None, **options):
    """Serves the page of a model, whose folder or Hub id is `model`, until it is interrupted. Nothing is sent anywhere else.

    Args:
        host, port: None is 127.0.0.1 and the first free port from 7860, or the variables GRADIO_SERVER_NAME and
            GRADIO_SERVER_PORT.
        options: of Gradio's `Blocks.launch`.
    """
    page = create_page(pipeline, model)
    page.queue(default_concurrency_limit=1)
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        show_error=True,
        ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        footer_links=[],
        **options,
    )


def create_page(pipeline: HydraPipeline, model: str) -> gr.Blocks:
    """The page with the tabs that the model has something for."""
    pipeline.set_progress_bar_config(disable=True)
    tasks = find_tasks(pipeline.processor, read_tags(model))
    page = Page(pipeline, tasks)
    with gr.Blocks(
        title=f"HYDRA: {Path(model).name}", analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as blocks:
        gr.Markdown(describe(pipeline, Path(model).name))
        with gr.Row():
            with gr.Column(min_width=COLUMN):
                page.add_picture()
            with gr.Column(min_width=COLUMN), gr.Tabs():
                page.add_tabs()
    return blocks


def describe(pipeline: HydraPipeline, name: str) -> str:
    """The heading: which model this is, where it runs, and what it knows if that is little."""
    parameters = sum(parameter.numel() for parameter in pipeline.model.parameters())
    size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
    text = f"# HYDRA\n{name}, {size} parameters, on {pipeline.model.device}. One model sees, answers and draws."
    words = pipeline.processor.known_words
    if words is None:
        return text
    return f"{text}\n\nIt knows a small world of {len(words)} words and nothing else: start from the examples."


class Page:
    """The parts of the page, made in the order in which they are shown."""

    def __init__(self, pipeline: HydraPipeline, tasks: list[str]):
        self.pipeline, self.processor, self.tasks = pipeline, pipeline.processor, tasks
        self.actions, self.patch_size = Actions(pipeline), pipeline.processor.patch_size

    def add_picture(self) -> None:
        self.picture = gr.Image(
            label="Picture", type="pil", format="png", height=COLUMN, elem_id="picture", elem_classes="fill",
            buttons=["download", "fullscreen"],
        )  # fmt: skip
        self.status = gr.Markdown("Draw a picture, upload one, or take an example.", elem_id="status")
        gr.Examples(PICTURES, self.picture, label="Pictures to start from")

    def add_tabs(self) -> None:
        painted = [task for task in ("depth", "segment") if task in self.tasks]
        clips = [task for task in ("video_generate", "video_understand") if task in self.tasks]
        tabs = {
            "Draw": ("generate" in self.tasks, self.add_drawing),
            "Ask": ("understand" in self.tasks, self.add_question),
            "Edit": ("edit" in self.tasks, self.add_edit),
            "Rebuild": (True, self.add_rebuilding),
            "Maps": (bool(painted), lambda: self.add_painting(painted)),
            "Clips": (bool(clips), lambda: self.add_clips(clips)),
        }
        for title, (is_shown, add) in tabs.items():
            if is_shown:
                with gr.Tab(title):
                    add()

    def add_drawing(self) -> None:
        prompt = gr.Textbox(label="What to draw", placeholder="a cat")
        buttons = self._buttons("Draw")
        gr.Examples(examples_of("generate", self.processor), prompt)
        _, *grid = self.pipeline.get_grid(None, None)
        with gr.Accordion("Settings", open=False):
            settings = self._settings()
            with gr.Row():
                sides = [
                    gr.Number(number * self.patch_size, label=side, precision=0, step=self.patch_size)
                    for side, number in zip(("Height in pixels", "Width in pixels"), grid)
                ]

        def draw(prompt: str, seed: int, steps: int, guidance: float, height: int, width: int):
            yield from self._live(
                prompt, seed, num_inference_steps=steps, guidance_scale=guidance, height=height, width=width
            )

        self._run(draw, [prompt, *settings, *sides], [self.picture, self.status], prompt, *buttons)

    def add_question(self) -> None:
        question = gr.Textbox(label="Question", placeholder="what is in the picture?")
        (button,) = self._buttons("Ask", can_stop=False)
        reply = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
        gr.Examples(examples_of("understand", self.processor), [self.picture, question])

        def ask(picture, question: str) -> str:
            self._name_unknown_words(question)
            return self.actions.ask(given(picture, "picture"), question)

        self._run(ask, [self.picture, question], reply, question, button)

    def add_edit(self) -> None:
        instruction = gr.Textbox(label="How to change the picture", placeholder="remove the star")
        buttons = self._buttons("Edit")
        edited = self._output("Edited", "edited")
        status = gr.Markdown()
        keep = gr.Button("Keep as the picture", size="sm")
        gr.Examples(examples_of("edit", self.processor), [self.picture, instruction])
        with gr.Accordion("Settings", open=False):
            settings = self._settings()

        def edit(picture, instruction: str, seed: int, steps: int, guidance: float):
            yield from self._live(
                instruction, seed, image=given(picture, "picture"), num_inference_steps=steps, guidance_scale=guidance
            )

        self._run(edit, [self.picture, instruction, *settings], [edited, status], instruction, *buttons)
        keep.click(lambda image: image, edited, self.picture, api_visibility="private")

    def add_rebuilding(self) -> None:
        gr.Markdown("What the tokenizer keeps of the picture: encoded and decoded again.")
        (button,) = self._buttons("Rebuild", can_stop=False)
        copy = self._output("Rebuilt", "rebuilt")

        def rebuild(picture):
            return self.actions.rebuild(given(picture, "picture"))

        self._run(rebuild, [self.picture], copy, None, button)

    def add_painting(self, tasks: list[str]) -> None:
        (button,) = self._buttons("Paint", can_stop=False)
        labels = {"depth": "Depth, near is bright", "segment": "Boundaries"}
        with gr.Row():
            maps = [self._output(labels[task], task) for task in tasks]

        def paint(picture):
            return self.actions.paint(given(picture, "picture"), tasks)

        self._run(paint, [self.picture], maps, None, button)

    def add_clips(self, tasks: list[str]) -> None:
        clip = gr.Video(
            label="Clip", elem_id="clip", elem_classes="fill", autoplay=True, loop=True, height=COLUMN, buttons=["download"]
        )  # fmt: skip
        status = gr.Markdown()
        if "video_generate" in tasks:
            prompt = gr.Textbox(label="What happens", placeholder="a cat moves to the right")
            num_frames = gr.Slider(5, 33, 17, step=4, label="Frames")
            buttons = self._buttons("Draw clip")
            gr.Examples(examples_of("video_generate", self.processor), prompt)

            def draw_clip(prompt: str, num_frames: int):
                for frames, text in self._live(prompt, 0, num_frames=num_frames):
                    if frames is None:
                        yield None, text
                        continue
                    with TemporaryDirectory() as folder:
                        write_video(path := Path(folder, "clip.mp4"), frames, FPS)
                        yield str(path), text

            self._run(draw_clip, [prompt, num_frames], [clip, status], prompt, *buttons)
        if "video_understand" in tasks:
            question = gr.Textbox(label="Question about the clip", placeholder="what moves?")
            (button,) = self._buttons("Ask about the clip", can_stop=False)
            reply = gr.Textbox(label="Answer", interactive=False, elem_id="clip_answer")
            gr.Examples(examples_of("video_understand", self.processor), [clip, question])

            def ask_clip(clip: str | None, question: str) -> str:
                self._name_unknown_words(question)
                return self.actions.ask(given(clip, "clip"), question)

            self._run(ask_clip, [clip, question], reply, question, button)

    # What the tabs share

    def _buttons(self, title: str, can_stop: bool = True) -> list[gr.Button]:
        with gr.Row():
            start = gr.Button(title, variant="primary", min_width=120)
            return [start, gr.Button("Stop", min_width=80)] if can_stop else [start]

    def _output(self, label: str, name: str) -> gr.Image:
        return gr.Image(
            label=label, type="pil", format="png", height=COLUMN - 40, interactive=False, elem_id=name, elem_classes="fill",
            buttons=["download", "fullscreen"],
        )  # fmt: skip

    def _settings(self) -> list:
        steps, guidance = (
            self.pipeline.config[f"default_{name}"] for name in ("num_inference_steps", "guidance_scale")
        )
        return [
            gr.Number(0, label="Seed", precision=0, minimum=0),
            gr.Slider(1, max(100, steps), steps, step=1, label="Steps"),
            gr.Slider(1, max(10, guidance), guidance, step=0.1, label="Guidance, 1 is none"),
        ]

    def _run(self, function, inputs: list, outputs, text, start: gr.Button, stop: gr.Button | None = None) -> None:
        """Runs a function on a button, and on Enter in its text, in one queue with all others; `stop` ends it."""
        triggers = [start.click] if text is None else [start.click, text.submit]
        event = gr.on(
            triggers, function, inputs, outputs, api_name=function.__name__, concurrency_id="model",
            show_progress="hidden" if stop else "minimal",
        )  # fmt: skip
        if stop is not None:
            stop.click(None, cancels=[event], api_visibility="private")

    def _live(self, prompt: str, seed: int, **options) -> Iterator[tuple]:
        """What is drawn so far and which step it is, after each step."""
        self._name_unknown_words(prompt)
        for step, drawn in self.actions.draw(prompt, seed, **options):
            num_steps = self.pipeline.num_timesteps
            yield drawn, f"Step {step} of {num_steps}" if step < num_steps else f"Done: {step} steps, seed {seed}"

    def _name_unknown_words(self, text: str) -> None:
        if words := self.processor.unknown_words(text):
            gr.Warning(f"Words that this model does not know: {', '.join(words)}")


def given(value, name: str):
    """The value itself. Raises ValueError if the visitor has not given one."""
    if value is None:
        raise ValueError(f"There is no {name} yet: draw one, upload one, or take an example.")
    return value
