"""Make texts to train on, and records to measure with lm_eval, from multiple-choice questions of LLM-Adapters.

    python benchmarks/questions.py data/questions arc-easy-train.json arc-challenge-train.json openbookqa-train.json

The files are training sets as https://github.com/AGI-Edgerunners/LLM-Adapters writes them. Of each, question i is
measured if i is a multiple of 3, chooses settings if i mod 15 is 1, and is trained on otherwise:

    OUTPUT/{test,validation,train}.jsonl  "Question: ...\\nAnswer: ..." with the right answer, as lm_eval asks arc_easy;
                                          what an earlier one of these has, a later one leaves out
    OUTPUT/NAME.jsonl                     questions to measure, in the columns of allenai/ai2_arc
"""

import argparse
import json
import re
from pathlib import Path

QUESTION = re.compile(
    r"Please choose the correct answer to the question: (.*?)\n\n(Answer1: .*)\n\nAnswer format: .*", re.DOTALL
)

PARTS = ("test", "validation", "train")
"""What is measured comes first: a part leaves out what an earlier one has."""


def part_of(number: int) -> str:
    """Return the part that question ``number`` of its file belongs to."""
    if number % 3 == 0:
        return "test"
    return "validation" if number % 15 == 1 else "train"


def read_question(record: dict[str, str]) -> tuple[str, list[str], int]:
    """Return question, answers, and the number of the right answer, from 0."""
    found = QUESTION.fullmatch(record["instruction"])
    if found is None:
        raise SystemExit(f"this is no question with answers of LLM-Adapters: {record['instruction'][:80]!r}")
    answers = [answer.strip() for answer in re.split(r"Answer\d: ", found[2])[1:]]
    names = [f"answer{i}" for i in range(1, len(answers) + 1)]
    if record["answer"] not in names:
        raise SystemExit(f"the answer is {record['answer']!r}, and not one of {', '.join(names)}: {found[1][:80]!r}")
    return found[1], answers, names.index(record["answer"])


def write_lines(file: Path, records: list[dict[str, object]]) -> None:
    """Write ``records`` as JSON lines, and say how many."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{file}: {len(records):,}")


def main() -> None:
    """Read the files of the command line and write the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("files", type=Path, nargs="+", help="files of LLM-Adapters with several answers to a question")
    arguments = parser.parse_args()
    names = [file.stem for file in arguments.files]
    if len({*names, *PARTS}) < len(names) + len(PARTS):
        parser.error(
            f"files need names that differ from each other and from {', '.join(PARTS)}: they name what is written"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {part: [] for part in PARTS}
    for file in arguments.files:
        measured: list[dict[str, object]] = []
        for number, record in enumerate(json.loads(file.read_text())):
            question, answers, right = read_question(record)
            texts[part_of(number)].append(f"Question: {question}\nAnswer: {answers[right]}")
            if part_of(number) == "test":
                labels = [str(i) for i in range(len(answers))]
                choices = {"text": answers, "label": labels}
                name = f"{file.stem}-{number}"
                measured.append({"id": name, "question": question, "choices": choices, "answerKey": labels[right]})
        write_lines(arguments.output / f"{file.stem}.jsonl", measured)
    seen: set[str] = set()
    for part, lines in texts.items():
        kept = [line for line in lines if line not in seen]
        seen.update(lines)
        write_lines(arguments.output / f"{part}.jsonl", [{"text": line} for line in kept])


if __name__ == "__main__":
    main()
