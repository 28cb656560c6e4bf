"""benchmarks/questions.py: which questions are measured, and which texts a study trains on."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(folder: Path, *records: dict[str, str], name: str = "plants") -> subprocess.CompletedProcess[str]:
    (folder / f"{name}.json").write_text(json.dumps(records))
    script = str(ROOT / "benchmarks" / "questions.py")
    command = [sys.executable, script, str(folder / "out"), str(folder / f"{name}.json")]
    return subprocess.run(command, capture_output=True, text=True)


def record(question: str, right: int = 2) -> dict[str, str]:
    answers = "Answer1: roots  Answer2: leaves\nand stems Answer3: seeds"
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{answers}\n\nAnswer format: answer1/..."
    )
    return {"instruction": instruction, "answer": f"answer{right}", "input": "", "output": ""}


def texts(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_parts_by_number_with_the_right_answer(tmp_path: Path) -> None:
    done = make(tmp_path, *(record(f"What grows\nin row {i}?", right=i % 3 + 1) for i in range(32)))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    answers = ["roots", "leaves\nand stems", "seeds"]
    for part, numbers in {"test": range(0, 32, 3), "validation": [1, 16, 31]}.items():
        wanted = [f"Question: What grows\nin row {i}?\nAnswer: {answers[i % 3]}" for i in numbers]
        assert texts(out / f"{part}.jsonl") == wanted
    assert len(texts(out / "train.jsonl")) == 32 - 11 - 3
    measured = [json.loads(line) for line in (out / "plants.jsonl").read_text().splitlines()]
    assert [question["id"] for question in measured] == [f"plants-{i}" for i in range(0, 32, 3)]
    assert all(question["choices"] == {"text": answers, "label": ["0", "1", "2"]} for question in measured)
    assert [question["answerKey"] for question in measured] == ["0"] * 11


def test_what_is_measured_is_in_no_other_part(tmp_path: Path) -> None:
    """Questions 0 (test), 1 (validation) and 2, 4 (training) are the same; 5 has another right answer."""
    done = make(tmp_path, *map(record, ["Same?", "Same?", "Same?", "Else?", "Same?"]), record("Same?", right=1))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert [len(texts(out / f"{part}.jsonl")) for part in ("test", "validation", "train")] == [2, 0, 1]


def test_another_kind_of_question_is_refused(tmp_path: Path) -> None:
    done = make(tmp_path, {"instruction": "Is it true?", "answer": "true"})
    assert done.returncode and "no question with answers of LLM-Adapters: 'Is it true?'" in done.stderr
    done = make(tmp_path, record("What?", right=0))
    assert (
        done.returncode and "the answer is 'answer0', and not one of answer1, answer2, answer3: 'What?'" in done.stderr
    )


def test_files_that_would_be_overwritten_are_refused(tmp_path: Path) -> None:
    done = make(tmp_path, name="train")
    assert done.returncode == 2 and "files need names that differ" in done.stderr and not (tmp_path / "out").exists()
