"""Question files for evals.py: lines of multiple choice, and MMLU as CSV or JSON lines.

A file is checked as a whole before a model is loaded. An error names the file and the line.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

from cli.errors import UserError
from text.instructions import read_text

LETTERS = "ABCD"
_SUBJECTS = {  # Hendrycks et al., 2021: https://github.com/hendrycks/test, categories.py
    "STEM": """
        abstract_algebra astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics
        electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
        high_school_computer_science high_school_mathematics high_school_physics
        high_school_statistics machine_learning""",
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy
        prehistory professional_law world_religions""",
    "social sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology
        us_foreign_policy""",
    "other": """
        anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging
        management marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology""",
}
MMLU_CATEGORIES = {category: subjects.split() for category, subjects in _SUBJECTS.items()}


def read_json_lines(path: str | pathlib.Path, check: Callable[[dict], Any]) -> list:
    """[check(record)] for the JSON object in every line that is not empty.

    `check` raises ValueError for a bad record. Raises UserError with the line of the first one, and
    for a file without records.
    """
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(check(_json_object(line)))
        except (ValueError, RecursionError) as e:
            reason = getattr(e, "msg", e)
            raise UserError(
                f"{path}, line {number}: {reason}; correct or remove this line"
            ) from None
    if not items:
        raise UserError(f"{path} holds no questions; give one JSON object a line")
    return items


def _json_object(line):
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object in braces")
    # JSON can hold half a surrogate pair (\ud83d): UnicodeEncodeError, a ValueError
    json.dumps(record, ensure_ascii=False).encode()
    return record


def check_choices(record: dict) -> tuple[str, list[str], int]:
    """The question, its choices and the index of the right one, from a line of --multiple-choice.

    Raises ValueError.
    """
    question, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str):
        raise ValueError('"question" must be a string')
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_has_text, choices)):
        raise ValueError('"choices" must be a list of two or more strings, none of them empty')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f'"answer" must be the index of the right choice, 0 to {len(choices) - 1}, '
            f"not {answer!r}"
        )
    return question, choices, answer


def _has_text(choice):
    return isinstance(choice, str) and choice.strip() != ""


def check_mmlu(record: dict) -> tuple[str, str, int]:
    """The subject, the prompt and the answer's index, from a line of MMLU. Raises ValueError."""
    subject, prompt, letter = (record.get(key) for key in ("subject", "input", "output"))
    check_subject(subject)
    if not isinstance(prompt, str) or not prompt.endswith("Answer:"):
        raise ValueError('"input" must be a prompt that ends in "Answer:"')
    return subject, prompt, letter_index(letter)


def check_subject(subject: str):
    """Raises ValueError unless `subject` is one of MMLU's."""
    if not any(subject in subjects for subjects in MMLU_CATEGORIES.values()):
        raise ValueError(f"{subject!r} is none of MMLU's 57 subjects")


def letter_index(letter: str) -> int:
    """0 to 3 for A to D. Raises ValueError for anything else."""
    if letter not in list(LETTERS):
        raise ValueError(f"the answer must be A, B, C or D, not {letter!r}")
    return LETTERS.index(letter)


def read_mmlu(path: str | pathlib.Path, shots: int) -> list[tuple[str, str, int]]:
    """(subject, prompt, answer index) of every question, in MMLU's official prompt.

    path: the official folder (test/, and for shots dev/ too) or a JSON lines file of whole prompts.
    shots: how many solved examples a prompt begins with. Raises UserError.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        if shots:
            raise UserError(
                f"{path} is no folder, and only the official folder has examples for "
                f"--shots {shots}"
            )
        return read_json_lines(path, check_mmlu)
    files = sorted(path.glob("test/*_test.csv"))
    if not files:
        raise UserError(
            f"{path} has no test/*_test.csv; give the official folder (dev/ and test/) or a "
            "JSON lines file"
        )
    questions = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        try:
            check_subject(subject)
        except ValueError as e:
            raise UserError(f"{file}: {e}; rename or remove this file") from None
        beginning = _mmlu_beginning(path / "dev" / f"{subject}_dev.csv", subject, shots)
        for prompt, answer in read_mmlu_csv(file):
            questions.append((subject, beginning + prompt, answer))
    return questions


def _mmlu_beginning(file, subject, shots):
    """What precedes every question of a subject: one sentence, and `shots` solved examples."""
    topic = subject.replace("_", " ")  # the official script writes two spaces before it
    parts = [f"The following are multiple choice questions (with answers) about  {topic}.\n\n"]
    if shots:
        examples = read_mmlu_csv(file)
        if len(examples) < shots:
            raise UserError(f"{file} has {len(examples)} examples; lower --shots {shots}")
        parts += [f"{prompt} {LETTERS[answer]}\n\n" for prompt, answer in examples[:shots]]
    return "".join(parts)


def read_mmlu_csv(path: pathlib.Path) -> list[tuple[str, int]]:
    """(prompt, answer index) of every row; a row is question, A, B, C, D, letter.

    The prompt is the question, its choices and "Answer:". Raises UserError with the line of the
    first bad row.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    questions = []
    try:
        for row in filter(None, rows):
            if len(row) != 6:
                raise ValueError(
                    f"{len(row)} fields, not the six of question, four choices and answer"
                )
            question, *choices, letter = row
            lines = [f"\n{name}. {text}" for name, text in zip(LETTERS, choices, strict=True)]
            prompt = f"{question}{''.join(lines)}\nAnswer:"
            questions.append((prompt, letter_index(letter)))
    except (ValueError, csv.Error) as e:
        raise UserError(f"{path}, line {rows.line_num}: {e}; correct or remove this row") from None
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions
