"""Talk to the model, which answers and draws.

example: hydra chat --out drawn
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .common import (
    add_model,
    add_seed,
    check_out_folder,
    load_pipeline,
    open_image,
    print_unknown_words,
    save_image,
    show_image,
)


HELP = """/image PATH  attach an image to what you say next
/video PATH  attach a clip, if the model reads clips
/save PATH   write the last drawn image to a file
/reset       forget the dialogue
/quit        end"""


def add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("chat"), help="folder of the drawn images; chat by default")
    add_seed(command)
    command.add_argument("--max_new_tokens", type=int, default=32, help="most tokens of text in an answer")
    command.add_argument("--max_images", type=int, default=1, help="most images in an answer")
    command.add_argument("--num_inference_steps", type=int, help="denoising steps; the model's own number by default")
    command.add_argument(
        "--guidance_scale", type=float, help="1 or less turns guidance off; the model's own by default"
    )
    command.add_argument("--height", type=int, help="pixels, a multiple of the patch size")
    command.add_argument("--width", type=int, help="pixels, a multiple of the patch size")
    add_model(command, "--model")


def run(options: argparse.Namespace) -> Iterator[dict | None]:
    check_out_folder(options.out)
    chat = Chat(load_pipeline(options), options)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # lines can be edited and called back
        print(HELP)
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            yield chat.take(line)
        except (ValueError, OSError) as error:  # of one line: the chat continues
            print(f"hydra chat: {' '.join(str(error).split())}", file=sys.stderr)


class Chat:
    """A dialogue as messages, drawn images included, and what is attached to the next one.

    Raises ValueError for options that no image can be drawn with.
    """

    def __init__(self, pipeline, options: argparse.Namespace):
        import torch

        from hydra_hf.pipelines.arguments import check_integer

        self.model, self.processor, self.folder = pipeline.model, pipeline.processor, options.out
        own = {
            "num_inference_steps": pipeline.config.default_num_inference_steps,
            "guidance_scale": pipeline.config.default_guidance_scale,
        }
        names = ("height", "width", "max_images", "max_new_tokens", *own)
        drawing = own | {name: value for name in names if (value := getattr(options, name)) is not None}
        pipeline.check_inputs("", **{name: value for name, value in drawing.items() if not name.startswith("max_")})
        for name in ("max_images", "max_new_tokens"):
            check_integer(name, drawing[name])
        self.settings = drawing | {"generator": torch.Generator().manual_seed(options.seed)}
        self.settings["source_interaction"] = self.processor.video_token is not None  # HYDRA-X edits what it saw last
        self.messages, self.attached, self.last_image = [], [], None

    def take(self, line: str) -> dict | None:
        """Does what a line says, and returns what there is to know of it: an answer, or the path of a saved image.

        Raises ValueError or OSError if that cannot be done, and the dialogue stays as it was.
        """
        command, _, argument = line.partition(" ")
        commands = {"/image": self.attach_image, "/video": self.attach_video, "/save": self.save}
        if command == "/reset":
            self.messages, self.attached = [], []
        elif command in commands:
            if not argument.strip():
                raise ValueError(f"{command} needs a path.")
            return commands[command](Path(argument.strip()).expanduser())
        elif line.startswith("/"):
            raise ValueError(
                f"{command} is not a command, expected one of {', '.join([*commands, '/reset', '/quit'])}."
            )
        return self.say(line) if line and not line.startswith("/") else None

    def attach_image(self, path: Path) -> None:
        self.attached.append({"type": "image", "image": open_image(path)})

    def attach_video(self, path: Path) -> None:
        if self.processor.video_token is None:
            raise ValueError("this model reads no clips.")
        if not path.exists():
            raise ValueError(f"there is no clip {path}.")
        self.attached.append({"type": "video", "path": str(path)})

    def save(self, path: Path) -> dict:
        if self.last_image is None:
            raise ValueError("nothing has been drawn yet.")
        save_image(self.last_image, path)
        print(path)
        return {"path": str(path)}

    def say(self, text: str) -> dict:
        """Prints the answer: its text, and the files of its images. Returns it as parts."""
        from hydra_hf.pipelines.dialogue import reply

        print_unknown_words(self.processor, text)
        parts, self.attached = [*self.attached, {"type": "text", "text": text}], []
        messages = [*self.messages, {"role": "user", "content": parts}]
        answer, printed = reply(self.model, self.processor, messages, **self.settings), []
        for part in answer:
            if part["type"] == "text":
                printed.append({"type": "text", "text": part["text"].strip()})
                print(printed[-1]["text"], flush=True)
            else:
                printed.append({"type": "image", "path": str(self.keep(part["image"]))})
                print(printed[-1]["path"], flush=True)
                show_image(part["image"])
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return {"answer": printed}

    def keep(self, image) -> Path:
        """Writes a drawn image to the folder under the next free number."""
        taken = [int(path.stem) for path in self.folder.glob("*.png") if path.stem.isdecimal()]
        path = self.folder / f"{max(taken, default=0) + 1:03d}.png"
        save_image(image, path)
        self.last_image = image
        return path
