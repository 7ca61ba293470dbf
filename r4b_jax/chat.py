"""Talk to a model about pictures.

    python -m r4b_jax.chat CHECKPOINT --image chart.png "How many bars are below 40?"
    python -m r4b_jax.chat CHECKPOINT            questions one after another

CHECKPOINT is a Hugging Face folder, what `python -m r4b_jax.convert import` wrote, or a stage of a
run such as runs/tiny-seed0/bpo. Between questions: /image FILE shows a picture with the next one,
/mode auto|thinking|non-thinking, /clear forgets the conversation, /quit. Ctrl-C stops a reply.
"""

import argparse
import sys

COMMANDS = "/image FILE, /mode MODE, /clear, /quit"


class Session:
    """A conversation: the turns so far, the mode, and the pictures for the next question."""

    def __init__(self, model, mode: str, settings: dict):
        self.model, self.mode, self.settings = model, mode, settings
        self.history: list = []
        self.pictures: list[str] = []

    def ask(self, question: str):
        """Stream one answer to the console; Ctrl-C ends it, and it is then not remembered."""
        from r4b_jax.common.metrics import console

        reply, was_thought = None, False
        try:
            for piece in self.model.stream(
                question, self.pictures, self.mode, history=self.history, **self.settings
            ):
                if was_thought and not piece.is_thought and piece.text:
                    console.print()
                console.print(
                    piece.text, style="dim" if piece.is_thought else None, end="", markup=False
                )
                was_thought, reply = piece.is_thought and bool(piece.text), piece.reply
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="yellow")
            return
        console.print()
        if reply.answer is None:
            console.print("(cut off before the end: raise --max-new-tokens)", style="yellow")
        console.print(
            f"[{reply.mode}, P(think) {reply.p_think:.2f}, {reply.num_tokens} tokens]",
            style="cyan",
            markup=False,
        )
        self.history.append((question, self.pictures, reply.answer or ""))
        self.pictures = []

    def command(self, line: str) -> bool:
        """A line that begins with "/"; False to quit. Raises ValueError for one that is unknown."""
        from r4b_jax.data import images
        from r4b_jax.decoding.chat import MODE_NAMES

        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/quit":
            return False
        if name == "/clear":
            self.history, self.pictures = [], []
        elif name == "/image" and argument:
            images.read(argument)
            self.pictures = [*self.pictures, argument]
        elif name == "/mode" and argument in MODE_NAMES:
            self.mode = argument
        elif name == "/mode":
            raise ValueError(f"/mode is one of {', '.join(MODE_NAMES)}")
        else:
            raise ValueError(f"unknown command {line!r}: {COMMANDS}")
        return True

    def interact(self):
        """Questions from the keyboard until /quit or the end of the input."""
        from r4b_jax.common.metrics import console

        console.print(f"Ask, or {COMMANDS}.", style="dim")
        while True:
            try:
                line = input(f"[{self.mode}{' +image' * len(self.pictures)}] > ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            try:
                if line.startswith("/"):
                    if not self.command(line):
                        return
                elif line:
                    self.ask(line)
            except ValueError as error:  # a bad picture, mode or length: said, and on we go
                console.print(f"{error}", style="red", markup=False)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m r4b_jax.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("checkpoint")
    out.add_argument(
        "question", nargs="?", help="without one, questions are read from the keyboard"
    )
    out.add_argument("--image", action="append", default=[], help="may be given several times")
    modes = ("auto", "thinking", "long", "non-thinking", "short")
    out.add_argument("--mode", default="auto", choices=modes, help="long and short: other names")
    out.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    out.add_argument("--top-p", type=float, default=1.0)
    out.add_argument("--top-k", type=int, default=0, help="0 = all tokens")
    out.add_argument("--max-new-tokens", type=int, default=1024)
    out.add_argument(
        "--max-think-tokens", type=int, help="close a thought after so many, and answer"
    )
    out.add_argument(
        "--think-bias",
        type=float,
        default=None,
        help="added to the logit of thinking, by default what the checkpoint was calibrated to;"
        " --think-bias=inf and --think-bias=-inf force",
    )
    out.add_argument("--seed", type=int, default=0)
    out.add_argument(
        "--dtype", help="of the computation: float32, bfloat16; default the weights' own"
    )
    return out


def main():
    args = vars(parser().parse_intermixed_args())
    from r4b_jax.data import images
    from r4b_jax.decoding.chat import load

    checkpoint, question = args.pop("checkpoint"), args.pop("question")
    pictures, mode, dtype = args.pop("image"), args.pop("mode"), args.pop("dtype")
    try:
        for picture in pictures:  # a mistake in a name is told before the weights are read
            images.read(picture)
        session = Session(load(checkpoint, dtype), mode, args)
        session.pictures = pictures
        if question is None:
            session.interact()
        else:
            session.ask(question)
    except ValueError as error:
        print(f"r4b_jax: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
