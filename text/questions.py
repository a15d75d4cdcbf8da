"""Files of questions: JSON lines of multiple choice, and MMLU's official CSV files or JSON lines.

Every file is checked before a model is loaded. An error names the file and the line.
"""

import csv
import io
import json
import pathlib
from collections.abc import Callable

from cli.errors import UserError
from text.records import read_text

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


def read_json_lines(path: str | pathlib.Path, check: Callable[[dict], tuple]) -> list[tuple]:
    """[check(record)] for the JSON object of every line; `check` raises ValueError if it is bad."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no JSON object in braces")
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is a ValueError
            items.append(check(record))
        except (ValueError, RecursionError) as e:
            reason = getattr(e, "msg", e)
            raise UserError(
                f"{path}, line {number}: {reason}; correct or remove this line"
            ) from None
    if not items:
        raise UserError(f"{path} holds no questions; give one JSON object a line")
    return items


def check_choices(record: dict) -> tuple[str, list[str], int]:
    """The (question, choices, answer index) of one line of multiple choice."""
    question, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    if not isinstance(question, str):
        raise ValueError('"question" must be a string')
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError('"choices" must be a list of two or more strings, none of them empty')
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f'"answer" must be the index of the right choice, 0 to {len(choices) - 1}, not '
            f"{answer!r}"
        )
    return question, choices, answer


def check_mmlu(record: dict) -> tuple[str, str, int]:
    """The (subject, prompt, answer index) of one line of MMLU as JSON lines."""
    subject, prompt, letter = (record.get(key) for key in ("subject", "input", "output"))
    check_subject(subject)
    if not isinstance(prompt, str) or not prompt.endswith("Answer:"):
        raise ValueError('"input" must be a prompt that ends in "Answer:"')
    return subject, prompt, letter_index(letter)


def check_subject(subject: str) -> None:
    """Raises ValueError for what is none of MMLU's subjects."""
    if not any(subject in subjects for subjects in MMLU_CATEGORIES.values()):
        raise ValueError(f"{subject!r} is none of MMLU's 57 subjects")


def letter_index(letter: str) -> int:
    """0 to 3 for A to D; ValueError for anything else."""
    if letter not in list(LETTERS):
        raise ValueError(f"the answer must be A, B, C or D, not {letter!r}")
    return LETTERS.index(letter)


def read_mmlu(path: str | pathlib.Path, shots: int) -> list[tuple[str, str, int]]:
    """(subject, prompt, answer index) of every question of the official folder, or of JSON lines.

    The folder has test/ and, for worked examples (`shots` > 0), dev/.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        if shots:
            raise UserError(
                f"{path} is no folder, and only the official folder has examples for --shots "
                f"{shots}"
            )
        return read_json_lines(path, check_mmlu)
    files = sorted(path.glob("test/*_test.csv"))
    if not files:
        raise UserError(
            f"{path} has no test/*_test.csv; give the official folder (dev/ and test/) or a JSONL "
            "file"
        )
    questions = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        try:
            check_subject(subject)
        except ValueError as e:
            raise UserError(f"{file}: {e}; rename or remove this file") from None
        header = mmlu_header(path, subject, shots)
        for prompt, answer in read_mmlu_csv(file):
            questions.append((subject, header + prompt, answer))
    return questions


def mmlu_header(path: pathlib.Path, subject: str, shots: int) -> str:
    """What the official prompt has before a question: the subject, and `shots` worked examples."""
    named = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about  {named}.\n\n"
    file = path / "dev" / f"{subject}_dev.csv"
    examples = read_mmlu_csv(file) if shots else []
    if len(examples) < shots:
        raise UserError(f"{file} has {len(examples)} examples; lower --shots {shots}")
    for prompt, answer in examples[:shots]:
        header += f"{prompt} {LETTERS[answer]}\n\n"
    return header


def read_mmlu_csv(path: pathlib.Path) -> list[tuple[str, int]]:
    """(question, choices and "Answer:" as one text; answer index) of every row.

    A row has six fields: question, A, B, C, D, letter.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    questions = []
    try:
        for row in filter(None, rows):
            if len(row) != 6:
                raise ValueError(
                    f"{len(row)} fields, not the six of question, four choices and answer"
                )
            text = row[0]
            for letter, choice in zip(LETTERS, row[1:5], strict=True):
                text += f"\n{letter}. {choice}"
            questions.append((f"{text}\nAnswer:", letter_index(row[5])))
    except (ValueError, csv.Error) as e:
        raise UserError(f"{path}, line {rows.line_num}: {e}; correct or remove this row") from None
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions
