"""Task files are data: what could run code is refused before lm-eval opens the file, and names are resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from void_ext.evaluate import load_tasks
from void_ext.evaluate.task_files import TaskFileError, read_task_files
from void_ext.evaluate.tasks import DataError

pytest.importorskip("lm_eval")

PLAIN = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text('{"question": "What?", "answer": "That"}\n')
    (tmp_path / "mine.yaml").write_text(PLAIN.format(data=tmp_path / "data.jsonl"))
    # Whoever runs this leaves a mark.
    (tmp_path / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return doc['question']\n"
    )
    return tmp_path


def changed(folder: Path, *lines: str) -> Path:
    """The plain task with lines more; a name that is there already gets the new value."""
    path = folder / "changed.yaml"
    names = [line.split(":")[0] for line in lines]
    kept = [line for line in (folder / "mine.yaml").read_text().splitlines() if line.split(":")[0] not in names]
    path.write_text("\n".join([*kept, *lines]) + "\n")
    return path


CODE = [
    (["doc_to_text: !function code.text"], "doc_to_text is a !function"),
    (["process_docs: !function code.text"], "process_docs is a !function"),
    (
        ["filter_list: [{name: x, filter: [{function: custom, filter_fn: !function code.text}]}]"],
        r"filter_fn is a !func",
    ),
    (["description: !!python/object/apply:os.system ['true']"], "description is a !!python"),
    (["doc_to_text: '{{question}}'"], "doc_to_text is a template"),
    (["doc_to_text: '{% if question %}x{% endif %}'"], "doc_to_text is a template"),
    (["description: >-", "  several lines {{", "  question }}"], "description is a template"),
    (["fewshot_config: {doc_to_target: '{{answer}}'}"], r"fewshot_config\.doc_to_target is a template"),
    (["class: code.Task"], "class names a Python class"),
    (["dataset_path: code.py"], "dataset_path is a script"),
    (["dataset_path: pandas"], "expected one of json, csv, parquet"),
    (["dataset_path: FOLDER"], "holds scripts"),
    (["dataset_kwargs: {trust_remote_code: true}"], "asks for code from a hub"),
    (["metric_list: [{metric: ./score.py}]"], "is no metric of lm-eval"),
    (["metric_list: [{metric: acc, hf_evaluate: true}]"], "loads a metric's script"),
    (["generation_kwargs: {custom_generate: someone/else}"], "generates with code from a hub"),
    (["unsafe_code: true"], "runs code that the model writes"),
    (["use_prompt: 'promptsource:*'"], "takes a prompt template"),
    (["include: part.yaml"], "doc_to_choice is a !function"),
]


@pytest.mark.parametrize(("lines", "message"), CODE)
def test_what_can_run_code_is_refused_unread(
    folder: Path, lines: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import _yaml_loader

    (folder / "part.yaml").write_text("doc_to_choice: !function code.text\n")
    path = changed(folder, *(line.replace("FOLDER", str(folder)) for line in lines))
    monkeypatch.setattr(_yaml_loader, "load_yaml", lambda *_, **__: pytest.fail("lm-eval opened the file"))
    with pytest.raises(TaskFileError, match=message) as caught:
        load_tasks(["mine"], [path])
    assert str(path) in str(caught.value)
    assert "--allow-task-code" in str(caught.value)
    assert not (folder / "ran").exists()


def test_a_plain_file_is_loaded_and_never_opened_by_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import _factory, _index

    for module in (_factory, _index):
        monkeypatch.setattr(module, "load_yaml", lambda *_, **__: pytest.fail("lm-eval opened the file"))
    tasks = load_tasks(["mine"], [folder / "mine.yaml"])
    task = tasks["mine"].task
    assert task.doc_to_text(task.eval_docs[0]) == "What?"
    assert task.doc_to_target(task.eval_docs[0]) == "That"


def test_allowed_code_is_run(folder: Path) -> None:
    path = changed(folder, "doc_to_text: !function code.text", "doc_to_target: '{{answer}}!'")
    task = load_tasks(["mine"], [path], allow_code=True)["mine"].task
    assert (folder / "ran").exists()
    assert task.doc_to_text(task.eval_docs[0]) == "What?"
    assert task.doc_to_target(task.eval_docs[0]) == "That!"


def test_only_what_is_asked_for_has_to_be_harmless(folder: Path) -> None:
    changed(folder, "task: other", "doc_to_text: !function code.text")
    assert list(load_tasks(["mine"], [folder])) == ["mine"]
    with pytest.raises(TaskFileError, match=r"changed\.yaml: this task can run code"):
        load_tasks(["mine", "other"], [folder])


def test_groups_and_tags_are_taken_apart(folder: Path) -> None:
    changed(folder, "task: second", "tag: kin")
    (folder / "group.yaml").write_text(
        "group: pair\ntask: [mine, {task: second, generation_kwargs: {until: ['?'], max_gen_toks: 2}}]\n"
    )
    tasks = load_tasks(["pair"], [folder])
    assert {name: entry.group for name, entry in tasks.items()} == {"mine": "pair", "second": "pair"}
    assert tasks["second"].task.get_config("generation_kwargs")["max_gen_toks"] == 2
    assert list(load_tasks(["kin"], [folder])) == ["second"]
    with pytest.raises(ValueError, match="'mine' is asked for twice"):
        load_tasks(["pair", "mine"], [folder])
    (folder / "group.yaml").write_text("group: pair\ntask: [pair]\n")
    with pytest.raises(TaskFileError, match="nested more than 8 deep, or in a circle"):
        load_tasks(["pair"], [folder])
    (folder / "group.yaml").write_text("group: pair\ntask: [mine, gone]\n")
    with pytest.raises(TaskFileError, match="expected names of tasks that --task-path has, got 'gone'"):
        load_tasks(["pair"], [folder])
    changed(folder, "task: second", "doc_to_text: '{{question}}'")
    (folder / "group.yaml").write_text("group: pair\ntask: [mine, second]\n")
    with pytest.raises(TaskFileError, match="is a template"):
        load_tasks(["pair"], [folder])
    (folder / "group.yaml").write_text("group: pair\ntask: [{task: mine, doc_to_text: '{{question}}'}]\n")
    with pytest.raises(TaskFileError, match=r"task\[0\]\.doc_to_text is a template"):
        load_tasks(["pair"], [folder])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        (b"- a\n- b\n", "expected names with values, got list"),
        (b"doc_to_text: question\n", "an entry 'task' or 'group'"),
        (b"task: mine\ninclude: changed.yaml\n", "includes itself"),
        (b"task: mine\ninclude: gone.yaml\n", "cannot be read"),
        (b"task: mine\ninclude: [[1]]\n", "expected the name of a file behind 'include'"),
        (b"a: &a [x]\n" + b"task: [" + b"*a, " * 200 + b"]\n", "at most 100 aliases"),
        (b"task: x" * 700_000, "at most 4194304 bytes"),
    ],
)
def test_what_is_no_task_file_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "changed.yaml").write_bytes(content)
    with pytest.raises(TaskFileError, match=message):
        read_task_files([folder / "changed.yaml"])


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or directory at"):
        read_task_files([tmp_path / "gone.yaml"])
    with pytest.raises(FileNotFoundError, match=r"no \.yaml file below"):
        read_task_files([tmp_path])


def test_the_same_name_twice(folder: Path) -> None:
    changed(folder)
    with pytest.raises(TaskFileError, match="'mine': defined in both"):
        read_task_files([folder])


class FewTasks:
    """Stands for the harness's index, which takes a minute to build."""

    all_tasks = ("arc_easy", "boolq", "mmlu", "mmlu_anatomy", "mmlu_law")

    def __init__(self, include_defaults: bool = True) -> None: ...


def test_an_unknown_name_gets_near_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    with pytest.raises(ValueError, match="called 'mmlu_anatomie': did you mean mmlu_anatomy"):
        load_tasks(["mmlu_anatomie"], [folder])
    with pytest.raises(ValueError, match="did you mean mine"):
        load_tasks(["mines"], [folder])
    with pytest.raises(ValueError, match=r"no name is near it\. `lm-eval ls tasks` lists"):
        load_tasks(["xyzxyz"], [folder])


def test_an_unknown_name_tells_of_files_that_were_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", FewTasks)
    broken = folder / "broken.yaml"
    broken.write_text("task: second\ndoc_to_text: [\n")
    with pytest.raises(ValueError, match=r"no task, group or tag is called 'second'") as caught:
        load_tasks(["second"], [folder])
    assert f"could not be used: {broken}: not YAML" in str(caught.value)
    (folder / "group.yaml").write_text("group: pair\ntask: [mine, second]\n")
    with pytest.raises(TaskFileError, match=r"got 'second'; .*broken\.yaml: not YAML"):
        load_tasks(["pair"], [folder])
    # A task of the harness is not taken for the user's own of the same name.
    broken.rename(folder / "boolq.yaml")
    with pytest.raises(TaskFileError, match=r"boolq\.yaml: not YAML"):
        load_tasks(["boolq"], [folder])
    monkeypatch.undo()
    assert list(load_tasks(["mine"], [folder])) == ["mine"]


def test_without_network_the_message_says_what_to_fetch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from void_ext.evaluate import tasks

    monkeypatch.setattr(tasks, "hub_out_of_reach", lambda: True)
    before = datasets.config.HF_HUB_OFFLINE
    path = changed(folder, "dataset_path: someone/questions", "dataset_name: hard", "dataset_kwargs: {}")
    with pytest.raises(DataError) as caught:
        load_tasks(["mine"], [path])
    text = str(caught.value)
    assert "its documents (someone/questions) are not in the Hugging Face cache" in text
    assert """python -c 'import datasets; datasets.load_dataset("someone/questions", "hard")'`""" in text
    assert str(datasets.config.HF_DATASETS_CACHE) in text
    assert "--task-path" in text
    assert before == datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("dataset_kwargs: {data_files: {test: /nowhere/data.jsonl}}", DataError, "a file that it names is not there"),
        ("test_split: exam", ValueError, "a field or a split that it names is not in its documents"),
        (
            "metric_list: [{metric: exact_match, aggregation: middle}]",
            ValueError,
            "'mine': lm-eval knows no aggregation",
        ),
        ("output_type: guess", ValueError, "task 'mine' could not be loaded: ValueError: Got invalid output_type"),
    ],
)
def test_a_task_that_does_not_fit_its_documents(folder: Path, line: str, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        load_tasks(["mine"], [changed(folder, line)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["doc_to_text: quest"], r"task 'mine': doc_to_text: expected a column of its documents, got 'quest'"),
        (["doc_to_target: answers"], "doc_to_target: expected a column of its documents, got 'answers'"),
        (["output_type: multiple_choice", "doc_to_choice: choises", "metric_list: [{metric: acc}]"], "got 'choises'"),
        (["num_fewshot: 1", "fewshot_config: {doc_to_text: quest}"], r"fewshot_config\.doc_to_text: .*got 'quest'"),
    ],
)
def test_a_column_that_is_not_there_is_no_prompt(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(TaskFileError, match=f"{message}.*; they have question, answer") as caught:
        load_tasks(["mine"], [changed(folder, *lines)])
    assert "could not be loaded" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["doc_to_text: ''"],
        ["output_type: multiple_choice", "doc_to_choice: [That, This]", "metric_list: [{metric: acc}]"],
        ["output_type: multiple_choice", 'doc_to_choice: \'["That", "This"]\'', "metric_list: [{metric: acc}]"],
        ["output_type: multiple_choice", "doc_to_choice: [That]", "doc_to_target: 0", "metric_list: [{metric: acc}]"],
    ],
)
def test_what_is_meant_literally_is_taken_so(folder: Path, lines: list[str]) -> None:
    assert list(load_tasks(["mine"], [changed(folder, *lines)])) == ["mine"]


def test_a_template_is_no_name_of_a_column(folder: Path) -> None:
    path = changed(folder, "doc_to_text: 'Say {{answer}}:'", "doc_to_target: answr")
    with pytest.raises(TaskFileError, match="doc_to_target: expected a column"):
        load_tasks(["mine"], [path], allow_code=True)
