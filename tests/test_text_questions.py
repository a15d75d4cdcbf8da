"""text/questions.py: questions and MMLU's prompts to the letter, and the line of what is wrong."""

import pathlib
import re

import pytest
from helpers_text import write_mmlu

from cli.errors import UserError
from text.questions import MMLU_CATEGORIES, check_choices, read_json_lines, read_mmlu
from text.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 1}'
GOOD_MMLU = '{"subject": "anatomy", "input": "q\\nAnswer:", "output": "A"}'


def test_joined_question_and_choice_are_the_tokens_of_the_whole_text(material):
    llama_tokenizer = load_tokenizer(material("llama-tokenizer.model"))
    items = read_json_lines(material("hellaswag-500.jsonl"), check_choices)
    assert len(items) == 500
    for question, choices, _ in items:
        for choice in choices:
            joined = llama_tokenizer.encode(question) + llama_tokenizer.encode(choice)
            assert joined == llama_tokenizer.encode(f"{question} {choice}")


def test_mmlu_has_57_subjects_in_four_categories():
    sizes = {category: len(subjects) for category, subjects in MMLU_CATEGORIES.items()}
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len(set().union(*MMLU_CATEGORIES.values())) == 57


def test_a_few_shot_prompt_is_the_official_one_to_the_letter(tmp_path):
    examples = [["Who?", "he", "she", "they", "1,5", "C"], ["Why?", "a", "b", "c", "d", "A"]]
    question = ['A "quoted"\nquestion, with commas:', "", "NA", "é", "1.50", "D"]
    files = {
        "dev/us_foreign_policy_dev.csv": examples,
        "test/us_foreign_policy_test.csv": [question],
    }
    write_mmlu(tmp_path, files)
    start = (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
    )
    end = 'A "quoted"\nquestion, with commas:\nA. \nB. NA\nC. é\nD. 1.50\nAnswer:'
    solved = [
        "Who?\nA. he\nB. she\nC. they\nD. 1,5\nAnswer: C\n\n",
        "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\n",
    ]
    for shots in range(3):
        expected = start + "".join(solved[:shots]) + end
        assert read_mmlu(tmp_path, shots) == [("us_foreign_policy", expected, 3)]
    with pytest.raises(
        UserError, match="us_foreign_policy_dev.csv has 2 examples; lower --shots 3"
    ):
        read_mmlu(tmp_path, 3)


def test_real_prompts_taken_apart_into_csv_files_come_back_as_they_were(material, tmp_path):
    published = read_mmlu(material("mmlu-val-6-subjects.jsonl"), 0)
    pattern = r".*?\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:"
    rows = {}
    for subject, prompt, answer in published:
        parts = re.fullmatch(pattern, prompt, re.DOTALL).groups()
        rows.setdefault(f"test/{subject}_test.csv", []).append([*parts, "ABCD"[answer]])
    found = read_mmlu(write_mmlu(tmp_path, rows), 0)
    assert found == sorted(published, key=lambda question: question[0])


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "Expecting property name"),
        ("[]", "no JSON object"),
        ('{"choices": ["a", "b"], "answer": 1}', '"question"'),
        ('{"question": "q", "choices": ["a"], "answer": 0}', '"choices"'),
        ('{"question": "q", "choices": ["a", " "], "answer": 0}', '"choices"'),
        ('{"question": "q", "choices": "ab", "answer": 0}', '"choices"'),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "0 to 1, not 2"),
        ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "0 to 1, not -1"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "not True"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "1"}', "not '1'"),
        ('{"question": "\\ud83d", "choices": ["a", "b"], "answer": 1}', "surrogates"),
        ("[" * 100000, "recursion"),
        ("\udcff", "0xff is not UTF-8"),
    ],
)
def test_a_bad_line_of_questions_is_named(tmp_path, line, complaint):
    file = tmp_path / "questions.jsonl"
    content = f"{GOOD}\n\n{line}\n{GOOD}\n"
    file.write_text(content, errors="surrogateescape", encoding="utf-8")
    message = re.escape(f"{file}, line 3: ") + ".*" + re.escape(complaint)
    with pytest.raises(UserError, match=message):
        read_json_lines(file, check_choices)
    file.write_text(f"{GOOD}\r\n\r\n{GOOD}")
    assert read_json_lines(file, check_choices) == [("q", ["a", "b"], 1)] * 2


@pytest.mark.parametrize(
    "line, complaint",
    [
        (
            '{"subject": "astrology", "input": "q\\nAnswer:", "output": "A"}',
            "'astrology' is none of MMLU's 57",
        ),
        ('{"subject": "anatomy", "input": "q", "output": "A"}', '"input"'),
        ('{"subject": "anatomy", "input": "q\\nAnswer:", "output": "E"}', "not 'E'"),
        ('{"subject": "anatomy", "input": "q\\nAnswer:", "output": "AB"}', "not 'AB'"),
        (
            '{"subject": ["anatomy"], "input": "q\\nAnswer:", "output": "A"}',
            "is none of MMLU's 57",
        ),
    ],
)
def test_a_bad_line_of_mmlu_is_named(tmp_path, line, complaint):
    file = tmp_path / "mmlu.jsonl"
    file.write_text(f"{GOOD_MMLU}\n{line}\n")
    message = re.escape(f"{file}, line 2: ") + ".*" + re.escape(complaint)
    with pytest.raises(UserError, match=message):
        read_mmlu(file, 0)
    file.write_text(GOOD_MMLU)
    with pytest.raises(UserError, match="--shots 5"):
        read_mmlu(file, 5)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("q,a,b,c,d,A\nq,a,b,c,A\n", "line 2: 5 fields"),
        ('q,a,b,c,d,A\n\n"q\nq",a,b,c,d,a\n', "line 4: .*not 'a'"),
        ('q,a,b,c,d,A\n"q,a,b,c,d,A\n', "line 2: "),
        ("\n", "holds no questions"),
    ],
)
def test_a_bad_row_of_mmlu_is_named(tmp_path, content, complaint):
    write_mmlu(tmp_path, {"test/anatomy_test.csv": []})
    (tmp_path / "test" / "anatomy_test.csv").write_text(content)
    with pytest.raises(UserError, match="anatomy_test.csv.*" + complaint):
        read_mmlu(tmp_path, 0)


def test_folders_that_are_not_mmlu_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="has no test/"):
        read_mmlu(tmp_path, 0)
    row = ["q", "a", "b", "c", "d", "A"]
    write_mmlu(tmp_path, {"test/anatomy_test.csv": [row]})
    with pytest.raises(UserError, match="cannot read .*anatomy_dev.csv"):
        read_mmlu(tmp_path, 5)
    write_mmlu(tmp_path, {"test/astrology_test.csv": [row]})
    with pytest.raises(UserError, match="astrology_test.csv: 'astrology' is none"):
        read_mmlu(tmp_path, 0)


# ---- the documentation's one-line conversions of well-known data sets


def lettered(texts):
    return [{"text": text, "label": letter} for text, letter in zip(texts, "ABCD", strict=True)]


HEAT = ["ice", "snow", "frost", "fire"]
SUN = ["puppies", "children", "flowers", "plants sprouting"]
ENDINGS = [
    "is using wrap.",
    "is ripping tiles.",
    "is holding a cube.",
    "starts pulling up roofing.",
]
OFFICIAL = {  # records as the data sets' authors publish them
    "HellaSwag": {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx": "A man is sitting on a roof. he",
        "endings": ENDINGS,
        "source_id": "activitynet~v_-JhWjGDPHMY",
        "split": "val",
        "label": 3,
    },
    "PIQA": {
        "goal": "When boiling butter, when it's ready, you can",
        "sol1": "Pour it onto a plate",
        "sol2": "Pour it into a jar",
    },
    "ARC": {
        "id": "Mercury_7",
        "question": {"stem": "What is hot?", "choices": lettered(HEAT)},
        "answerKey": "D",
    },
    "OpenBookQA": {
        "id": "7-980",
        "question": {"stem": "The sun is responsible for", "choices": lettered(SUN)},
        "answerKey": "D",
    },
    "WinoGrande": {
        "qID": "3",
        "sentence": "Sarah was a better surgeon than Maria so _ always got the easier cases.",
        "option1": "Sarah",
        "option2": "Maria",
        "answer": "2",
    },
    "BoolQ": {
        "question": "does ethanol take more energy",
        "title": "Ethanol fuel",
        "answer": False,
        "passage": "All biomass goes.",
    },
}
CONVERTED = {
    "HellaSwag": ("Roof shingle removal: A man is sitting on a roof. he", ENDINGS, 3),
    "PIQA": (
        "Question: When boiling butter, when it's ready, you can\nAnswer:",
        ["Pour it onto a plate", "Pour it into a jar"],
        1,
    ),
    "ARC": ("Question: What is hot?\nAnswer:", HEAT, 3),
    "OpenBookQA": ("The sun is responsible for", SUN, 3),
    "WinoGrande": (
        "Sarah was a better surgeon than Maria so",
        ["Sarah always got the easier cases.", "Maria always got the easier cases."],
        1,
    ),
    "BoolQ": (
        "All biomass goes.\nQuestion: does ethanol take more energy?\nAnswer:",
        ["no", "yes"],
        0,
    ),
}


def documented_code(name):
    """The first code in the row of a data set, in a table of README.md or docs/."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"| {name} |"):
                return line.split("`")[1]
    raise AssertionError(f"no page has a row for {name}")


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_documented_lines_convert_official_records(name):
    code = documented_code(name)
    if name == "OpenBookQA":  # its row has only what differs from ARC's
        question = r'"question": .*?, "choices"'
        code = re.sub(question, code + ', "choices"', documented_code("ARC"))
    r = OFFICIAL[name]
    names = {"r": r, "q": r.get("question"), "label": "1"}  # PIQA's labels are a file of their own
    assert check_choices(eval(code, names)) == CONVERTED[name]
