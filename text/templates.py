"""Chat templates: a conversation as the text that a model reads and is trained on.

A template is a program in Jinja, as Hugging Face's folders and GGUF files carry one. It is a
stranger's code, so it runs in Jinja's immutable sandbox and for a limited number of steps. A model
without a template has Alpaca's, which is one as well.

What a template writes itself may be control tokens, such as `<|im_end|>`. What the data say never
is: a control token's name in them is broken up by a mark while the template works, and the mark is
taken out afterwards.
"""

import dataclasses
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
MARK = "\ufdd0"  # no character, and never will be one
STEPS = 10_000, 1_000  # lines of a template that may run: in all, and more for each turn


class Part(NamedTuple):
    """A piece of a conversation's text: one control token, or a text without any."""

    text: str
    control: int | None  # the token's id
    goes_on: bool  # whether the part before it is a text too, which this one goes on from
    learned: bool  # whether the model learns to say it


@dataclasses.dataclass(frozen=True)
class Template:
    """A template, with what it may write of a vocabulary."""

    source: str  # in Jinja
    controls: Mapping[str, int]  # the ids of the control tokens that it can write, by their text
    bos: str  # the texts of these tokens, for `bos_token` and `eos_token` in the template
    eos: str

    @functools.cached_property
    def program(self) -> jinja2.Template:
        """The compiled template; UserError where it is no Jinja."""
        try:
            return environment().from_string(self.source)
        except Exception as e:
            raise self.failed(e, "is not valid") from None

    @functools.cached_property
    def pattern(self) -> re.Pattern:
        """Finds control tokens; the longest first, as one may begin with another."""
        names = sorted(filter(None, self.controls), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")  # (?!) matches nothing

    @functools.cached_property
    def end_of_turn(self) -> int | None:
        """The control token that ends an answer; None where the template writes none."""
        probe = (Turn("user", "a"), Turn("assistant", "b"))
        learned = [part for part in self.parts(probe) if part.learned]
        return learned[-1].control

    def parts(self, record: Record) -> list[Part]:
        """A whole conversation; of it the assistant's words are learned, and what ends its turn.

        What follows the last answer is left out. Raises UserError as `cuts` does.
        """
        mark = mark_beside(record)
        whole = self.render(record, mark)
        cuts = self.cuts(record, whole, mark)
        return self.divided(whole[: cuts[-1]] if cuts else whole, cuts, mark)

    def asking(self, turns: Sequence[Turn]) -> list[Part]:
        """The text that asks for an answer to the conversation so far, in the same parts."""
        mark = mark_beside(turns)
        whole = self.render(turns, mark, asks=True)
        return self.divided(whole, self.cuts(turns, whole, mark), mark)

    def cuts(self, turns: Sequence[Turn], whole: str, mark: str) -> list[int]:
        """Where in the rendered text `whole` each answer begins and ends.

        An answer is what the template adds to the text that asks for it, up to the last control
        token. Raises UserError as `render` does, and for a template that writes a conversation so
        far otherwise once it has gone on.
        """
        cuts = []
        for k, turn in enumerate(turns):
            if turn.role == "assistant":
                asked = self.render(turns[:k], mark, asks=True)
                said = self.render(turns[: k + 1], mark)
                if not (said.startswith(asked) and whole.startswith(said)):
                    raise UserError(
                        f"the chat template ({self.source[:40]!r} ...) writes the beginning of a "
                        "conversation otherwise once it has gone on, so what is learned of it is "
                        "not clear; choose another with --template, such as alpaca"
                    )
                names = list(self.pattern.finditer(said, len(asked)))
                cuts += [len(asked), names[-1].end() if names else len(said)]
        return cuts

    def divided(self, text: str, cuts: list[int], mark: str) -> list[Part]:
        """The parts of a rendered text; it is learned between every other pair of cuts."""
        parts = []
        edges = [0, *cuts, len(text)]
        for i, (start, end) in enumerate(itertools.pairwise(edges)):
            for piece in self.split_at_controls(text[start:end]):
                control = self.controls.get(piece)
                goes_on = bool(parts) and parts[-1].control is None and control is None
                parts.append(Part(piece.replace(mark, ""), control, goes_on, i % 2 == 1))
        return parts

    def split_at_controls(self, text: str) -> Iterator[str]:
        """Texts and control tokens in turn, none empty."""
        start = 0
        for found in self.pattern.finditer(text):
            yield from filter(None, (text[start : found.start()], found[0]))
            start = found.end()
        yield from filter(None, (text[start:],))

    def render(self, turns: Sequence[Turn], mark: str, asks: bool = False) -> str:
        """What the template makes of a conversation, with `mark` in control tokens' names.

        asks: with what comes before the next answer. Raises UserError for whatever goes wrong in
        the template: it may refuse a conversation, as one without alternating roles.
        """

        def harmless(text):
            return self.pattern.sub(lambda name: f"{name[0][0]}{mark}{name[0][1:]}", text)

        messages = []
        for role, text, input in turns:
            text, input = harmless(text), harmless(input)
            message = {"role": role, "content": f"{text}\n\n{input}" if input else text}
            if input:
                message |= {"instruction": text, "input": input}
            messages.append(message)
        values = {
            "messages": messages,
            "add_generation_prompt": asks,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        most, more = STEPS
        try:
            return with_limit(most + more * len(turns), lambda: self.program.render(values))
        except UserError:
            raise
        except Exception as e:
            begins = f"a conversation that begins with {turns[0].text[:40]!r}" if turns else "none"
            raise self.failed(e, f"fails on {begins}") from None

    def failed(self, error: Exception, how: str) -> UserError:
        """The error of a template that does not work."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return UserError(
            f"the chat template ({self.source[:40]!r} ...) {how} ({reason}); choose another with "
            "--template, such as alpaca"
        )


def mark_beside(turns: Sequence[Turn]) -> str:
    """A mark that is in none of the texts."""
    mark = MARK
    while any(mark in turn.text or mark in turn.input for turn in turns):
        mark += MARK
    return mark


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
    """The surroundings that Hugging Face's templates expect.

    But for `strftime_now`: with today's date in it, an example would be another one tomorrow.
    Templates that ask for it have a date of their own where it is missing.
    """
    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    sandbox.globals["raise_exception"] = raise_exception
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
