"""Chat templates: a conversation as the text that a model reads and is trained on.

A template is a program in Jinja, as Hugging Face's folders and GGUF files carry one. It is a
stranger's code, so it runs in Jinja's immutable sandbox and for a limited number of steps. A model
without a template has Alpaca's, which is one as well.

What a template writes itself may be control tokens, such as `<|im_end|>`. What the data say never
is: while the template works, a control token's name in them is broken up by marks, which are taken
out afterwards.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Never

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from cli.errors import UserError
from text.instructions import Record, Turn

# Stanford Alpaca's template (Taori et al., 2023), word for word. It knows one question and its
# answer. Here an answer ends with EOS, another question follows after an empty line, and a system
# message takes the place of the first lines
REQUEST = "Write a response that appropriately completes the request."
ALPACA = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '\\n\\n### Response: ' + message.content + eos_token -}}"
    "{%- else -%}"
    "{%- if loop.first and message.input -%}"
    "{{- 'Below is an instruction that describes a task, paired with an input that provides "
    f"further context. {REQUEST}' -}}}}"
    "{%- elif loop.first -%}"
    f"{{{{- 'Below is an instruction that describes a task. {REQUEST}' -}}}}"
    "{%- endif -%}"
    "{%- if message.role == 'tool' -%}{{- '\\n\\n### Tool:\\n' + message.content -}}"
    "{%- elif message.input -%}"
    "{{- '\\n\\n### Instruction:\\n' + message.instruction -}}"
    "{{- '\\n\\n### Input:\\n' + message.input -}}"
    "{%- else -%}{{- '\\n\\n### Instruction:\\n' + message.content -}}"
    "{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n\\n### Response:' -}}{%- endif -%}"
)
MARK = "\ufdd0"  # a code point that Unicode will never assign
STEPS, STEPS_A_TURN = 10_000, 1_000  # how many lines of a template may run for a conversation
TODAY = datetime.date(2024, 7, 26)  # for every template: a real date would change the examples


class Part(NamedTuple):
    """A piece of a conversation's text: one control token, or a text without any."""

    text: str
    control: int | None  # the token's id
    follows_text: bool  # whether the part before it is a text too
    learned: bool  # whether the model learns to say it


@dataclasses.dataclass(frozen=True)
class Template:
    """A template, with what it may write of a vocabulary."""

    source: str  # in Jinja
    controls: Mapping[str, int]  # {text: id} of the control tokens that it can write
    bos: str  # the texts of BOS and EOS, which are `bos_token` and `eos_token` in the template
    eos: str

    @functools.cached_property
    def program(self) -> jinja2.Template:
        """The compiled template; UserError where it is no Jinja."""
        try:
            return environment().from_string(self.source)
        except Exception as e:
            raise self.error(f"is not valid ({in_one_line(e)})") from None

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        """Finds control tokens; the longest first, as one may begin with another.

        One of a single character is left out: it could not be broken up in the data.
        """
        names = [name for name in self.controls if len(name) > 1]
        names = sorted(names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) matches nothing

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The control token that ends an answer.

        Raises UserError as `parts` does, and for a template that does not write what is said.
        """
        question, answer = "What is asked?", "What is answered."
        parts = self.parts((Turn("user", question), Turn("assistant", answer)))
        for said, learned in ((question, False), (answer, True)):
            if said not in "".join(part.text for part in parts if part.learned == learned):
                raise self.error(f"does not write what is said, such as {said!r}, in its place")
        return parts[-1].control

    def parts(self, record: Record) -> list[Part]:
        """A whole conversation; of it the assistant's words are learned, and what ends its turn.

        That is the template's control token, or else EOS. What follows the last answer is left out.
        Raises UserError as `cuts` does.
        """
        mark = mark_beside(record)
        whole = self.render(record, mark)
        cuts = self.cuts(record, whole, mark)
        return self.divided(whole[: cuts[-1]] if cuts else whole, cuts, mark)

    def asking(self, turns: Sequence[Turn]) -> list[Part]:
        """What asks for an answer to the conversation so far, in the same parts.

        Raises UserError as `cuts` does.
        """
        mark = mark_beside(turns)
        whole = self.render(turns, mark, asks=True)
        return self.divided(whole, self.cuts(turns, whole, mark), mark)

    def cuts(self, turns: Sequence[Turn], whole: str, mark: str) -> list[int]:
        """Where in the rendered text `whole` each answer begins and ends.

        An answer is what the template adds to the text that asks for it, without line breaks after
        a control token at its end. Raises UserError as `render` does, and for a template that
        writes no answer, or a conversation so far otherwise once it has gone on.
        """
        cuts = []
        for k, turn in enumerate(turns):
            if turn.role == "assistant":
                asked = self.render(turns[:k], mark, asks=True)
                said = self.render(turns[: k + 1], mark)
                if not (said.startswith(asked) and whole.startswith(said)):
                    raise self.error(
                        "writes the beginning of a conversation otherwise once it has gone on, "
                        f"such as of {beginning(turns)}, so what is to be learned is not clear"
                    )
                if said == asked:
                    raise self.error(f"leaves out the answer {turn.text[:40]!r}")
                names = [name.end() for name in self.pattern.finditer(said, len(asked))]
                ends_with_control = names and not said[names[-1] :].strip()
                cuts += [len(asked), names[-1] if ends_with_control else len(said)]
        return cuts

    def divided(self, text: str, cuts: list[int], mark: str) -> list[Part]:
        """The parts of a rendered text: what is read and what is learned, in turn."""
        parts = []
        edges = [0, *cuts, len(text)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            learned = i % 2 == 1
            for piece, control in self.split_at_controls(text[start:end]):
                follows_text = bool(parts) and parts[-1].control is None and control is None
                parts.append(Part(piece.replace(mark, ""), control, follows_text, learned))
            if learned and parts[-1].control is None:
                parts.append(Part(self.eos, self.controls[self.eos], False, True))
        return parts

    def split_at_controls(self, text: str) -> Iterator[tuple[str, int | None]]:
        """(text, None) and (control token's name, its id) in turn; no text is empty."""
        start = 0
        for found in self.pattern.finditer(text):
            if start < found.start():
                yield text[start : found.start()], None
            yield found[0], self.controls[found[0]]
            start = found.end()
        if start < len(text):
            yield text[start:], None

    def render(self, turns: Sequence[Turn], mark: str, asks: bool = False) -> str:
        """What the template makes of a conversation, whose own control tokens `mark` breaks up.

        asks: with what comes before the next answer. Raises UserError for whatever goes wrong in
        the template: it may refuse a conversation, as one without alternating roles.
        """

        def broken_up(text):
            return self.pattern.sub(lambda name: mark.join(name[0]) + mark, text)

        messages = []
        for turn in turns:
            text, about = broken_up(turn.text), broken_up(turn.input)
            message = {"role": turn.role, "content": f"{text}\n\n{about}" if about else text}
            if about:  # as Alpaca's template wants it
                message |= {"instruction": text, "input": about}
            messages.append(message)
        values = {
            "messages": messages,
            "add_generation_prompt": asks,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": None,
            "documents": None,
        }
        steps = STEPS + STEPS_A_TURN * len(turns)
        try:
            text = with_limit(steps, lambda: self.program.render(values))
            text.encode()  # a template can write half a character, which is no text
            return text
        except UserError:
            raise
        except Exception as e:
            raise self.error(f"fails on {beginning(turns)} ({in_one_line(e)})") from None

    def error(self, what: str) -> UserError:
        """The error of a template that does not work."""
        return UserError(
            f"the chat template ({self.source[:40]!r} ...) {what}; correct it, or choose another "
            "with train.py --template, such as alpaca"
        )


def in_one_line(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def beginning(turns: Sequence[Turn]) -> str:
    """What tells a conversation from others, for an error."""
    return f"a conversation that begins with {turns[0].text[:40]!r}" if turns else "nothing said"


def mark_beside(turns: Sequence[Turn]) -> str:
    """A mark that is in none of the texts."""
    mark = MARK
    while any(mark in turn.text or mark in turn.input for turn in turns):
        mark += MARK
    return mark


def check_template(source: str) -> None:
    """Raises UserError for what no model could be trained in, whatever its tokenizer."""
    Template(source, {"<s>": 1, "</s>": 2}, "<s>", "</s>").end_of_turn  # noqa: B018


def alpaca_template(with_bos: bool) -> str:
    """Alpaca's template, for a model that has BOS before a text or has not."""
    return "{{- bos_token -}}" + ALPACA if with_bos else ALPACA


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's text that asks for an answer, up to and including `### Response:`."""
    return BARE_ALPACA.render([Turn("user", instruction, input)], MARK, asks=True)


BARE_ALPACA = Template(ALPACA, {}, "", "")


# ---- the sandbox


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Products of small numbers only."""
        for value in (left, right):
            if not isinstance(value, int | float) or abs(value) > 2**31:
                raise SecurityError(f"{operator} is for small numbers only")
        if operator == "**" and abs(right) > 31:
            raise SecurityError(f"{operator} is for small numbers only")
        return super().call_binop(context, operator, left, right)


class Generation(jinja2.ext.Extension):
    """The tags `{% generation %}`, `{% endgeneration %}` around an answer; they write nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """What stands between them."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def environment() -> Sandbox:
    """The surroundings that Hugging Face's templates expect."""
    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = TODAY.strftime
    sandbox.filters["tojson"] = tojson
    return sandbox


def raise_exception(message: str) -> Never:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def tojson(value: Any, **options: Any) -> str:
    """JSON as transformers writes it; Jinja's own filter is for HTML."""
    allowed = ("ensure_ascii", "indent", "separators", "sort_keys")
    given = {name: value for name, value in options.items() if name in allowed}
    return json.dumps(value, **{"ensure_ascii": False, **given})


def with_limit(steps: int, call: Callable[[], str]) -> str:
    """The result of `call`; RuntimeError once a template in it has run for more than `steps` lines.

    The sandbox itself lets a loop within a loop run for hours.
    """
    left = steps

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise RuntimeError(f"it does not end within {steps} steps")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)
