"""Sections ``evaluate`` and ``bench`` of a recipe."""

from typing import Annotated, Literal, TypeVar

from pydantic import Field

from fastdraft_hf._config import Count, Key, Number, Positive, Section
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.task_sets import KNOWN, TASK_NAMES, TaskSet, check_tasks
from fastdraft_hf.export.openvino import WeightFormat

N = TypeVar("N", int, float)
_Temperature = Annotated[Number, Field(ge=0)]

_TASKS_HELP = (
    f"held-out task sets: a list of {', '.join(KNOWN)}; or a mapping of names to settings "
    "(dataset, name, split, column, instruction, words, revision, rows)"
)
_MAX_MINUTES_HELP = "stop after so many minutes, with fewer prompts (at least one)"


class _Measuring(Section):
    """The settings that evaluate and bench share."""

    tasks: dict[Key, TaskSet] | list[str] = Field(list(TASK_NAMES), description=_TASKS_HELP)
    prompts_per_task: Positive = Field(
        16, description="prompts of each, drawn by the recipe's seed"
    )
    max_prompt_tokens: Positive = Field(400, description="longer prompts are skipped when drawing")
    max_new_tokens: Positive = Field(64, description="length limit of an answer")
    max_minutes: Annotated[Number, Field(gt=0)] | None = Field(None, description=_MAX_MINUTES_HELP)

    def check_values(self) -> None:
        check_tasks(self.tasks)


_GAMMA_HELP = "tokens drafted per round (γ), a number or a list; the paper uses 3"
_TEMPERATURE_HELP = (
    "temperature of the sampled runs, a number or a list; the paper uses 0.6. 0 in the list adds "
    "greedy runs at every γ; those at the first γ are always made"
)
_PATH_HELP = "our loop, or stock assisted generation (slower, the same greedy acceptance)"


class EvaluateConfig(_Measuring):
    """Measure acceptance on held-out prompts, and check that greedy output does not change."""

    max_prompt_tokens: Positive = Field(
        1500, description="longer prompts, or more than the target reads, are skipped when drawing"
    )
    num_assistant_tokens: list[Positive] | Positive = Field(3, description=_GAMMA_HELP)
    temperature: list[_Temperature] | _Temperature = Field(0.6, description=_TEMPERATURE_HELP)
    path: Literal["ours", "transformers"] = Field("ours", description=_PATH_HELP)
    untrained_prompts_per_task: Count = Field(
        4, ge=0, description="prompts on which the draft is also measured as it was before training"
    )

    def check_values(self) -> None:
        super().check_values()
        _check_numbers("num_assistant_tokens", self.gammas)
        _check_numbers("temperature", self.temperatures)
        if not any(self.temperatures):
            raise FastDraftError(
                "temperature: at least one must be above 0; greedy runs are always made"
            )

    @property
    def gammas(self) -> list[int]:
        """Every γ; single figures are of the first."""
        return _as_list(self.num_assistant_tokens)

    @property
    def temperatures(self) -> list[float]:
        """Every temperature as given, 0 included."""
        return _as_list(self.temperature)

    @property
    def sampled(self) -> list[float]:
        """The temperatures above 0; single figures are of the first."""
        return [t for t in self.temperatures if t > 0]

    @property
    def greedy_gammas(self) -> list[int]:
        """The γ of greedy runs: the first, or all if temperature 0 is in the list."""
        return self.gammas if 0 in self.temperatures else self.gammas[:1]


def _as_list(value: list[N] | N) -> list[N]:
    return list(value) if isinstance(value, list) else [value]


def _check_numbers(name: str, values: list[int] | list[float]) -> None:
    if not values:
        raise FastDraftError(f"{name}: the list is empty")
    if len(set(values)) < len(values):
        raise FastDraftError(f"{name}: a value is repeated in {values}")


# Engines that are measured as running servers.
SERVERS = ("vllm", "llama.cpp")
# Engines whose sampling `fastdraft audit` tests.
AUDITED = ("transformers", "ours", "openvino", "ours-openvino", *SERVERS)

# fmt: off
BenchPath = Literal["transformers", "ours", "prompt-lookup",
                    "openvino", "openvino-prompt-lookup", "ours-openvino", "vllm", "llama.cpp"]
# fmt: on
_PATHS_HELP = (
    "what is timed: transformers (stock), ours (our loop), prompt-lookup (stock, no draft), "
    "openvino (GenAI), openvino-prompt-lookup (GenAI), ours-openvino (our loop over "
    "OVModelForCausalLM), vllm or llama.cpp (running servers: `server`, `server_alone`); "
    "OpenVINO's are skipped where it is not installed"
)
_SERVER_HELP = (
    "URL of a vLLM or llama.cpp that was started with the draft; num_assistant_tokens is the γ "
    "that it was started with"
)


class BenchConfig(_Measuring):
    """Measure wall clock with and without the draft, in turn, over γ."""

    tasks: dict[Key, TaskSet] | list[str] = Field(["humaneval", "ifbench"], description=_TASKS_HELP)
    prompts_per_task: Positive = Field(
        12, description="prompts of each, drawn by the recipe's seed; fewer make wide intervals"
    )
    num_assistant_tokens: list[Positive] = Field([1, 2, 3, 4, 5], description="values of γ to try")
    paths: list[BenchPath] = Field(["transformers", "openvino"], description=_PATHS_HELP)
    weight_format: WeightFormat = Field("int8", description="OpenVINO weights of target and draft")
    server: str | None = Field(None, description=_SERVER_HELP)
    server_alone: str | None = Field(
        None, description="URL of the same engine with the target alone; the two take turns"
    )

    def check_values(self) -> None:
        from fastdraft_hf.data.engines.server import server_url

        super().check_values()
        _check_numbers("num_assistant_tokens", self.num_assistant_tokens)
        engines = set(SERVERS) & set(self.paths)
        for name, url in (("server", self.server), ("server_alone", self.server_alone)):
            if url is not None:
                server_url(url, name)
            if bool(engines) != (url is not None):
                raise FastDraftError(
                    f"{name}: paths vllm and llama.cpp need it, and no other path does; start the "
                    "engine twice, with the draft and without"
                )
        if engines and (len(engines) > 1 or len(self.num_assistant_tokens) > 1):
            raise FastDraftError(
                "num_assistant_tokens: a server has one engine and one γ; give one path of vllm "
                "and llama.cpp, and the γ that the server was started with"
            )
