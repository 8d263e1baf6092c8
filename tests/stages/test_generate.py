"""Stage generate over real tokenizers and files, with an engine that writes known texts."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from data.vllm_server import VLLMServer, deterministic
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.engines import Completion, Request
from fastdraft_hf.data.filters import kept_indices
from fastdraft_hf.data.parts import iter_rows
from fastdraft_hf.data.prompts import chat_ids, template_ends
from fastdraft_hf.data.sources import Documents, Source, check_source
from fastdraft_hf.data.task_sets import load_task_set
from fastdraft_hf.data.traffic import read_traffic
from fastdraft_hf.export import openvino
from fastdraft_hf.recipe import build_recipe
from fastdraft_hf.stages import generate, generated_sets
from fastdraft_hf.stages.runner import Run, choose, execute
from fastdraft_hf.target.resolve import Target


class Killed(BaseException):
    """Stands for a kill: no `except Exception` may swallow it."""


class Writer:
    """Writes what ``text_of`` says; remembers what it was asked."""

    name = "writer"

    def __init__(
        self, tokenizer: Any, text_of: Callable[[Request], str], dies_after: int | None = None
    ) -> None:
        self.tokenizer, self.text_of, self.dies_after = tokenizer, text_of, dies_after
        self.asked: list[Request] = []

    def generate(
        self, requests: Iterable[Request], on_tokens: Callable[[int], None]
    ) -> Iterator[Completion]:
        for request in requests:
            if len(self.asked) == self.dies_after:
                raise Killed
            self.asked.append(request)
            ids = self.tokenizer(self.text_of(request), add_special_tokens=False)["input_ids"]
            on_tokens(len(ids) + 1)
            yield Completion(request, (*ids, self.tokenizer.eos_token_id), "stop")


def answer(request: Request) -> str:
    return f"the cat {request.prompt_hash} {request.temperature} in the hat"


@pytest.fixture
def make(
    tmp_path: Path, tiny_target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Run, Writer]]:
    """Make a run with one set, ``mine``; its engine is a `Writer`."""

    def made(
        wanted: dict[str, Any],
        text_of: Callable[[Request], str] = answer,
        target: Path = tiny_target_folder,
        mode: dict[str, Any] | None = None,
        **engine: Any,
    ) -> tuple[Run, Writer]:
        recipe = build_recipe(
            {
                "chat_template_kwargs": mode or {},
                "device": "cpu",
                "seed": 5,
                "generate": {
                    "engine": "transformers",
                    "sets": {"mine": wanted},
                },
            }
        )
        writer = Writer(AutoTokenizer.from_pretrained(target), text_of, **engine)
        monkeypatch.setattr(generate, "_open_engine", lambda *args: writer)
        return Run(recipe, tmp_path / "run", Target(target, "tiny", license="mit")), writer

    return made


def run_generate(run: Run) -> dict[str, Any]:
    execute(run, choose(run.recipe, ["generate"]))
    record = json.loads((run.stage_folder("generate") / "provenance.json").read_text())
    facts: dict[str, Any] = record["facts"]["sets"]["mine"]
    return facts


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Chats of every sort, some that must not or cannot be asked."""
    held_out = load_task_set("ifbench")[0].text
    chats = [
        [{"role": "user", "content": "Is the cat in?"}],
        [
            {"role": "system", "content": "Be the hat."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "Here."},
            {"role": "user", "content": "And the cat?"},
            {"role": "assistant", "content": "There."},
        ],
        [{"role": "user", "content": "Is the cat in?"}],
        [{"role": "user", "content": f"Do this. {held_out}"}],
        [{"role": "user", "content": "in the hat " * 200}],
        [{"role": "assistant", "content": "On that."}],
        [{"role": "user", "content": "On that cat?"}],
    ]
    return jsonl(tmp_path, [{"id": n, "messages": chat} for n, chat in enumerate(chats)])


def test_a_dataset_answered_at_every_temperature(
    make: Callable[..., tuple[Run, Writer]], prompts: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {
        "kind": "dataset",
        "dataset": prompts,
        "system_prompt": "Speak of cats.",
        "max_prompt_tokens": 300,
        "temperatures": [0.0, 0.6, 1.0],
        "temperatures_per_prompt": "all",
        "top_p": 0.9,
        "max_new_tokens": 50,
    }
    run, writer = make(settings)
    facts = run_generate(run)
    assert facts["prompts"] == {
        "kept": 3,
        "duplicate": 1,
        "overlaps held-out text": 1,
        "too long": 1,
        "no user turn": 1,
    }
    asked = {
        chat_ids(tiny_tokenizer, turns)
        for turns in (
            [("system", "Speak of cats."), ("user", "Is the cat in?")],
            [("system", "Speak of cats."), ("user", "On that cat?")],
            [
                ("system", "Be the hat."),
                ("user", "Where?"),
                ("assistant", "Here."),
                ("user", "And the cat?"),
            ],
        )
    }
    wanted = Counter((prompt, temperature) for prompt in asked for temperature in (0.0, 0.6, 1.0))
    assert Counter((r.prompt_ids, r.temperature) for r in writer.asked) == wanted
    assert {(r.temperature > 0, r.top_p) for r in writer.asked} == {(False, 1.0), (True, 0.9)}
    rows = list(iter_rows(run.stage_folder("generate") / "mine"))
    assert [row["index"] for row in rows] == list(range(9))
    assert facts["rows"] == 9


def test_a_changed_dataset_is_refused(
    make: Callable[..., tuple[Run, Writer]], prompts: str
) -> None:
    settings = {"kind": "dataset", "dataset": prompts, "max_prompt_tokens": 300}
    run, _ = make(settings, dies_after=1)
    with pytest.raises(Killed):
        run_generate(run)
    lines = Path(prompts).read_text().splitlines(keepends=True)
    Path(prompts).write_text("".join(lines[:-1]))
    run, writer = make(settings)
    with pytest.raises(
        FastDraftError, match=r"^generate\.sets\.mine\.kind: the prompts are not those"
    ):
        run_generate(run)
    assert not writer.asked
    Path(prompts).write_text("".join(lines))
    run, writer = make(settings)
    assert run_generate(run)["rows"] == 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"column": "message"}, r"column: .* \(did you mean 'messages'\?\); it has: id, messages"),
        ({"column": "id"}, "column: 'id' of .* holds neither text nor chat messages but int"),
        ({"context_columns": ["id"]}, "context_columns: 'messages' holds chats"),
        (
            {"max_prompt_tokens": 3},
            r"kind: dataset gives no usable prompt \(.*too long: 5",
        ),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(
    make: Callable[..., tuple[Run, Writer]],
    prompts: str,
    wanted: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = make({"kind": "dataset", "dataset": prompts, **wanted})
    monkeypatch.setattr(generate, "_open_engine", lambda *a: pytest.fail("work was started"))
    with pytest.raises(FastDraftError, match=rf"^generate\.sets\.mine\.{message}"):
        run_generate(run)


@pytest.fixture
def gemma(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tokenizer whose chat template knows no system turn and only turns by turns."""
    folder = tmp_path / "gemma"
    tiny_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    return folder


def test_a_template_without_a_system_turn(
    make: Callable[..., tuple[Run, Writer]], prompts: str, gemma: Path
) -> None:
    settings = {"kind": "dataset", "dataset": prompts, "max_prompt_tokens": 1000}
    run, _ = make({**settings, "system_prompt": "Speak of cats."}, target=gemma)
    with pytest.raises(
        FastDraftError, match=r"system_prompt: .* refuses .* \(roles must alternate"
    ):
        run_generate(run)
    run, _ = make(settings, target=gemma)
    assert run_generate(run)["prompts"]["refused by the chat template"] == 1


@pytest.mark.parametrize("style", ["chatml", "mistral"])
@pytest.mark.parametrize("in_answers", [True, False])
def test_magpie_asks_the_instructions_of_the_target(
    make: Callable[..., tuple[Run, Writer]],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    style: str,
    in_answers: bool,
) -> None:
    target = tmp_path / "styled"
    tiny_tokenizer.save_pretrained(target)
    if style == "mistral":
        (target / "chat_template.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% else %}"
            "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
        )
    held_out = load_task_set("humaneval")[3].text
    thought = [
        "Is the cat in the hat?",
        "Is the cat in the hat?",
        f"Complete this: {held_out}",
        "ah",
        "Then that hen sat on it?",
        "in the <|im_start|> hat then?",
        "the hat" + " the hat" * 60,
    ]

    def write(request: Request) -> str:
        if request.source == "mine":
            return answer(request)
        end = "" if style == "chatml" else " [/INST] Yes, it is."
        return thought[request.index % len(thought)] + end

    settings = {"kind": "magpie", "rows": 7, "system_prompt": "Be the hat."}
    run, writer = make({**settings, "system_prompt_in_answers": in_answers}, write, target=target)
    facts = run_generate(run)
    assert facts["instructions"] == {
        "kept": 2,
        "duplicate": 1,
        "loop": 1,
        "overlaps held-out text": 1,
        "special token": 1,
        "too short": 1,
    }
    # Training can read them as a set of their own: all but loops and duplicates.
    source = Source(name="mine/instructions")
    check_source(source, "", run.recipe.generate.readable if run.recipe.generate else [])
    read = list(Documents(source, run.stage_folder("generate")))
    assert len(read) == 5
    first = [r for r in writer.asked if r.source == "mine-instructions"]
    tokenizer = writer.tokenizer
    assert all(ids[: len(first[0].prompt_ids)] == list(first[0].prompt_ids) for ids in read)
    prefix, _ = template_ends(tokenizer, "Be the hat.")
    assert {r.prompt_ids for r in first} == {prefix}
    assert [r.temperature for r in first] == [0.7, 0.8, 0.9, 1.0, 0.7, 0.8, 0.9]
    assert {r.top_p for r in first} == {0.95}
    answered = {r.prompt_ids for r in writer.asked if r.source == "mine"}
    chats = {thought[0], thought[4]}
    if style == "chatml":
        system = "Be the hat." if in_answers else None
        assert answered == {chat_ids(tokenizer, text, system) for text in chats}
    texts = {tokenizer.decode(ids) for ids in answered}
    assert all(("Be the hat." in text) == in_answers and "Yes" not in text for text in texts)
    assert all(any(chat in text for text in texts) for chat in chats)


def test_the_limit_of_instructions_is_learned_from_the_first(
    make: Callable[..., tuple[Run, Writer]],
) -> None:
    def write(request: Request) -> str:
        return "the cat in the hat " * (1 + request.index) + "sat"

    run, writer = make({"kind": "magpie", "rows": 20}, write)
    run_generate(run)
    limits = [r.max_new_tokens for r in writer.asked if r.source == "mine-instructions"]
    lengths = sorted(len(writer.tokenizer(write(r)).input_ids) + 1 for r in writer.asked[:16])
    assert limits[:16] == [generated_sets.LONGEST_INSTRUCTION] * 16
    assert len(set(limits[16:])) == 1
    assert lengths[13] < limits[16] <= generated_sets.LONGEST_INSTRUCTION


@pytest.mark.parametrize("minutes", [None, 60])
def test_a_set_with_a_time_limit_answers_its_instructions_again(
    make: Callable[..., tuple[Run, Writer]], minutes: float | None
) -> None:
    def write(request: Request) -> str:
        thought = ("Is the cat in the hat?", "Then that hen sat on it?")
        return thought[request.index % 2] if "instr" in request.source else answer(request)

    run, writer = make({"kind": "magpie", "rows": 12, "max_minutes": minutes}, write)
    facts = run_generate(run)
    assert facts["instructions"]["kept"] == 2
    answers = [r for r in writer.asked if r.source == "mine"]
    assert len(answers) == facts["rows"] == (2 if minutes is None else 12)
    counts = Counter(r.prompt_ids for r in answers)
    assert set(counts.values()) == {len(answers) // 2}
    assert len({(r.prompt_ids, r.seed) for r in answers}) == len(answers)
    if minutes is not None:  # a prompt gets several temperatures
        temperatures = {(r.prompt_ids, r.temperature) for r in answers}
        assert len(temperatures) > 4


@pytest.mark.parametrize("kind", ["free", "magpie", "dataset"])
@pytest.mark.parametrize("dies_after", [None, 1])
def test_a_larger_set_keeps_the_rows_it_has(
    make: Callable[..., tuple[Run, Writer]],
    prompts: str,
    tmp_path: Path,
    kind: str,
    dies_after: int | None,
) -> None:
    """The set is the one that would have been made with so many rows at once."""
    settings = {
        "free": {"kind": "free"},
        "magpie": {"kind": "magpie"},
        "dataset": {"kind": "dataset", "dataset": prompts, "max_prompt_tokens": 300},
    }[kind]

    def write(request: Request) -> str:
        if request.source == "mine-instructions":  # one in three repeats the one before
            return f"Is cat {request.index - request.index % 3 // 2} in the hat?"
        return answer(request)

    less, more = (1, 3) if kind == "dataset" else (5, 11)
    run, first = make({**settings, "rows": less}, write)
    run_generate(run)
    run, second = make({**settings, "rows": more}, write, dies_after=dies_after)
    if dies_after is not None:
        with contextlib.suppress(Killed):
            run_generate(run)
    run, third = make({**settings, "rows": more}, write)
    facts = run_generate(run)
    whole, all_at_once = make({**settings, "rows": more}, write)
    whole.folder = tmp_path / "whole"
    assert facts == run_generate(whole)
    rows, other = (list(iter_rows(r.stage_folder("generate") / "mine")) for r in (run, whole))
    assert rows == other
    asked = [(r.source, r.index) for writer in (first, second, third) for r in writer.asked]
    if dies_after is None:  # no row is asked twice
        assert sorted(asked) == sorted((r.source, r.index) for r in all_at_once.asked)


def test_card_and_filters_of_a_finished_set(
    make: Callable[..., tuple[Run, Writer]], prompts: str, tmp_path: Path
) -> None:
    settings = {"kind": "dataset", "dataset": prompts, "max_prompt_tokens": 300}
    settings |= {"temperatures_per_prompt": "all"}

    def write(request: Request) -> str:
        return (
            ""
            if request.index == 1
            else "the hat" + " the hat" * 60
            if request.index == 2
            else "in the hat"
        )

    run, _ = make({**settings, "near_duplicates": None, "temperatures": [0.6, 1.0]}, write)
    facts = run_generate(run)
    folder = run.stage_folder("generate") / "mine"
    kept, counts = kept_indices(folder)
    assert facts["filter"] == dict(counts) == {"kept": 3, "duplicate": 1, "empty": 1, "loop": 1}
    assert {1, 2}.isdisjoint(kept)
    card = (folder / "README.md").read_text()
    assert "  dataset: prompts.jsonl\n" in card  # and no folder of this machine
    assert str(tmp_path) not in card
    assert "mit, applies to its generations" in card
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == list(iter_rows(folder))


def test_a_recipe_with_a_server(tmp_path: Path, tiny_target_folder: Path) -> None:
    sets = {
        "chat": {"kind": "magpie", "rows": 40, "max_new_tokens": 9},
        "text": {"kind": "free", "rows": 33, "max_new_tokens": 12, "temperatures": [1.0]},
    }

    def run_with(**settings: Any) -> dict[str, Any]:
        recipe = build_recipe(
            {
                "target": str(tiny_target_folder),
                "device": "cpu",
                "generate": {"sets": sets, "batch_size": 4, **settings},
            }
        )
        execute(Run(recipe, tmp_path), ["generate"])
        record: dict[str, Any] = json.loads((tmp_path / "generate/provenance.json").read_text())
        return record

    with VLLMServer() as server:
        record = run_with(server=server.url)
    assert record["facts"]["engine"] == "server"
    assert len(list(iter_rows(tmp_path / "generate" / "text"))) == 33
    rows = list(iter_rows(tmp_path / "generate" / "chat"))
    assert rows
    for row in rows:
        body = {
            "prompt": row["prompt_ids"],
            "temperature": {0: 0.0, 6: 0.6, 8: 0.8, 10: 1.0}[round(row["temperature"] * 10)],
            "top_p": row["top_p"],
            "seed": row["seed"],
            "stop_token_ids": [0, 2],
        }
        assert row["completion_ids"] == deterministic(body)[:9]
    # Which server generates decides nothing: the stage is finished.
    assert run_with(server="http://elsewhere")["id"] == record["id"]
    with pytest.raises(FastDraftError, match=r"other settings .*batch_size"):
        run_with(batch_size=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "openvino", "server": "http://h"}, r"generate\.server: engine openvino"),
        ({"server": "somewhere"}, r"generate\.server: 'somewhere' is not a URL"),
    ],
)
def test_engines_that_do_not_fit(
    tmp_path: Path, tiny_target_folder: Path, settings: dict[str, Any], message: str
) -> None:
    def run() -> None:
        recipe = build_recipe({"generate": {"sets": {"a": {"kind": "free"}}, **settings}})
        execute(Run(recipe, tmp_path, Target(tiny_target_folder, "tiny")), ["generate"])

    with pytest.raises(FastDraftError, match=message):
        run()


@pytest.mark.parametrize(
    ("name", "device", "installed", "family", "chosen"),
    [
        ("auto", "cpu", True, "llama", "openvino"),
        ("auto", "cuda", True, "llama", "transformers"),
        ("auto", "cpu", False, "llama", "transformers"),
        ("openvino", "cpu", False, "llama", r"generate\.engine: .*not installed; `pip install"),
        ("auto", "cpu", True, "olmo3", "transformers"),  # optimum-intel does not know it
        ("openvino", "cpu", True, "olmo3", r"generate\.engine: .*cannot export family 'olmo3'"),
    ],
)
def test_the_engine_of_a_machine_and_a_target(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: Any,
    device: str,
    installed: bool,
    family: str,
    chosen: str,
) -> None:
    if installed:
        pytest.importorskip("openvino_genai")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    made: list[str] = []
    for engine, kind in (("openvino", "OpenVINOEngine"), ("transformers", "TransformersEngine")):
        path = f"fastdraft_hf.stages.generate.{kind}"
        monkeypatch.setattr(path, lambda *args, engine=engine: made.append(engine))
    monkeypatch.setattr(openvino, "openvino_available", lambda: installed)
    monkeypatch.setattr(generate, "cached_openvino", lambda *args: Path("export"))
    if chosen in ("openvino", "transformers"):
        generate.load_engine(name, tmp_path, {2}, 4, device)
        assert made == [chosen]
    else:
        with pytest.raises(FastDraftError, match=chosen):
            generate.load_engine(name, tmp_path, {2}, 4, device)


def test_a_deleted_judgment_of_a_finished_stage_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "provenance.json").write_text('{"facts": {"sets": {"chat": {}}}}')
    assert generate.lacks_rows(tmp_path)
    (tmp_path / "chat" / "filters.json").write_text('{"rows": 0}')
    assert not generate.lacks_rows(tmp_path)


def test_the_mode_of_a_thinking_model(
    make: Callable[..., tuple[Run, Writer]], tmp_path: Path, tiny_target_folder: Path
) -> None:
    """It is in every prompt and in the record, and another one is another set."""
    folder = shutil.copytree(tiny_target_folder, tmp_path / "thinking")
    with (folder / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write("{% if not enable_thinking | default(true) %}<think></think>{% endif %}")
    mode, wanted = {"enable_thinking": False}, {"kind": "code", "rows": 2}
    run, writer = make(wanted, target=folder, mode=mode)
    run_generate(run)
    prompts = [writer.tokenizer.decode(request.prompt_ids) for request in writer.asked]
    assert len(prompts) == 2
    assert all(prompt.endswith("<think></think>") for prompt in prompts)
    record = json.loads((run.stage_folder("generate") / "provenance.json").read_text())
    assert record["chat_template_kwargs"] == mode
    with pytest.raises(FastDraftError, match=r"chat_template_kwargs\.enable_thinking: False then"):
        run_generate(make(wanted, target=folder)[0])


def test_what_was_answered_in_a_log_is_not_asked_again(
    make: Callable[..., tuple[Run, Writer]],
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    held_out = load_task_set("ifbench")[0].text

    def row(text: str, answer: str, reason: str = "stop") -> dict[str, Any]:
        message = {"role": "assistant", "content": answer}
        return {
            "messages": [{"role": "user", "content": text}],
            "response": {"choices": [{"message": message, "finish_reason": reason}]},
        }

    rows = [row(f"the cat {n}", f"in the hat {n}") for n in range(12)]
    rows += [row("the cat 1", "again"), row(f"Do this. {held_out}", "no"), {"messages": 3}]
    rows += [row("the " * 300, "too long"), row("on that cat", "it is cut", "length")]
    wanted = {
        "kind": "traffic",
        "dataset": jsonl(tmp_path, rows),
        "rows": 100,
        "max_prompt_tokens": 100,
        "near_duplicates": None,
    }
    run, writer = make(wanted)
    facts = run_generate(run)
    assert writer.asked == []
    kept = list(iter_rows(run.stage_folder("generate") / "mine"))
    own = read_traffic(str(wanted["dataset"]), False, Counter())
    texts = [str(one.answer["content"]) for one in own if isinstance(one.answer, dict)]
    decoded = [tiny_tokenizer.decode(one["completion_ids"], True) for one in kept]
    assert decoded == [text for text in texts if text not in ("again", "no", "too long")]
    reasons = [one["finish_reason"] for one in kept]
    assert reasons == ["length" if text == "it is cut" else "stop" for text in decoded]
    assert facts["prompts"]["no chat"] == 1
    assert facts["prompts"]["kept"] == len(kept)
    record = json.loads((run.stage_folder("generate") / "provenance.json").read_text())
    assert record["facts"]["engine"] == "log"


def test_a_log_without_a_usable_answer(
    make: Callable[..., tuple[Run, Writer]], tmp_path: Path
) -> None:
    run, _ = make({"kind": "traffic", "dataset": jsonl(tmp_path, [{"messages": []}])})
    with pytest.raises(FastDraftError, match=r"mine\.dataset: no usable answer .*no answer: 1"):
        run_generate(run)
