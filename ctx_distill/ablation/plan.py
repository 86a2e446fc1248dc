"""The ablation's plan, read from `stages/ablation.yaml`: arms, regimes, seeds, contrasts, and the jobs that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctx_distill.errors import InputError
from ctx_distill.files import hash_json
from ctx_distill.runs.stage_table import STAGES, merge, read_layer, stage_config, stages_folder

CORE = "core"


@dataclass(frozen=True)
class Regime:
    """One setting of what is varied; every field but `name` is a number that the table shows.

    Attributes:
        name: as the rows name it.
        pairs: CT-report pairs that an arm trains on.
        normals: share of them without any finding; None draws as the cohort comes.
        pool: X-rays of the index.
        expert: name of the X-ray expert.
        seeds: of training; every arm of the regime gets the same.
        arms: their names.
        more_seeds: further seeds, of some arms alone: those of the headline contrasts.
        more_seeds_arms: those arms.
    """

    name: str
    pairs: int
    pool: int
    expert: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    normals: float | None = None
    more_seeds: tuple[int, ...] = ()
    more_seeds_arms: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm: the stages that it runs, each with what it lays over the preset.

    Attributes:
        name: as the rows name it.
        title: for the table.
        group: `paper`, `ours`, `baseline` or `control`.
        stages: overrides by stage name, in the pipeline's order.
        trains: whether anything is trained; an arm that does not has one seed and no learning rate.
        pool_matters: whether the X-rays change its result; one that starts from nothing is not run again for them.
    """

    name: str
    title: str
    group: str
    stages: dict[str, dict[str, Any]]
    trains: bool = True
    pool_matters: bool = True


@dataclass(frozen=True)
class Contrast:
    """A difference that the protocol names: `arm` minus `against` within a regime."""

    arm: str
    against: str
    regime: str
    headline: bool = False


@dataclass(frozen=True)
class Expert:
    """An X-ray expert of the ablation: how long it trains, on how many X-rays and how many CT reports without images."""

    name: str
    xrays: int
    epochs: int
    corpus: int


@dataclass(frozen=True)
class Plan:
    """Everything that `stages/ablation.yaml` says."""

    cohort: dict[str, int]
    steps: int
    distill_share: float
    learning_rates: tuple[float, ...]
    selection_seed: int
    probe_shares: tuple[float, ...]
    experts: dict[str, Expert]
    regimes: dict[str, Regime]
    arms: dict[str, Arm]
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class AblationJob:
    """One training run of one arm and its score.

    Attributes:
        regime: the setting.
        arm: what is trained.
        seed: of the split of pairs, the initialisation and the order.
        learning_rate: of every trained stage.
        select: score on `val`, to choose the learning rate; else on `test`.
    """

    regime: Regime
    arm: Arm
    seed: int
    learning_rate: float
    select: bool = False

    @property
    def folder(self) -> Path:
        """Where it runs, below the run folder."""
        kind = f"lr-{self.learning_rate:g}" if self.select else f"seed-{self.seed}"
        return Path("select" if self.select else "runs") / self.regime.name / self.arm.name / kind


def read_plan(path: Path | None = None) -> Plan:
    """Read the plan.

    Args:
        path: default `stages/ablation.yaml`. A plan may name another one beside it as its `base` and is laid over it.

    Raises:
        InputError: the file does not have the plan's form.
    """
    path = path or stages_folder() / "ablation.yaml"
    raw = _raw_plan(path)
    try:
        arms = {name: _arm(path, name, raw["arms"]) for name in raw["arms"]}
        common = raw["regimes"].pop("common")
        regimes = {name: _regime(path, name, {**common, **(body or {})}, arms) for name, body in raw["regimes"].items()}
        contrasts = tuple(Contrast(**body) for body in raw["contrasts"])
        plan = Plan(
            cohort=dict(raw["cohort"]),
            steps=int(raw["steps"]),
            distill_share=float(raw["distill_share"]),
            learning_rates=tuple(float(rate) for rate in raw["learning_rates"]),
            selection_seed=int(raw["selection_seed"]),
            probe_shares=tuple(float(share) for share in raw["probe_shares"]),
            experts={name: Expert(name, **body) for name, body in raw["experts"].items()},
            regimes=regimes,
            arms=arms,
            contrasts=contrasts,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not an ablation plan ({error!r}); see the shipped stages/ablation.yaml.") from error
    for contrast in plan.contrasts:
        if contrast.regime not in regimes or {contrast.arm, contrast.against} - set(regimes[contrast.regime].arms):
            raise InputError(f"{path}: contrast {contrast} names an arm or a regime that is not run.")
    return plan


def _raw_plan(path: Path) -> dict[str, Any]:
    raw = read_layer(path)
    base = raw.pop("base", None)
    return merge(_raw_plan(path.with_name(base)), raw) if base else raw


def _arm(path: Path, name: str, arms: dict[str, Any]) -> Arm:
    body = arms[name]
    stages = _stages(name, arms)
    if unknown := sorted(set(stages) - set(STAGES)):
        raise InputError(f"{path}: arm {name!r} has a stage {unknown[0]!r}; expected {', '.join(STAGES)}.")
    ordered = {stage: stages[stage] or {} for stage in STAGES if stage in stages}
    return Arm(name, body["title"], body["group"], ordered, body.get("trains", True), body.get("pool_matters", True))


def _stages(name: str, arms: dict[str, Any]) -> dict[str, Any]:
    """The stages of an arm, laid over those of its `base`."""
    body = arms[name]
    own: dict[str, Any] = body.get("stages") or {}
    return merge(_stages(body["base"], arms), own) if "base" in body else own


def _regime(path: Path, name: str, body: dict[str, Any], arms: Iterable[str]) -> Regime:
    for key in ("arms", "more_seeds_arms"):
        if unknown := sorted(set(body.get(key, ())) - set(arms)):
            raise InputError(f"{path}: regime {name!r} names the arm {unknown[0]!r}, which is not among `arms`.")
    tuples = {key: tuple(value) for key, value in body.items() if isinstance(value, list)}
    return Regime(name=name, **{**body, **tuples})


def selection_jobs(plan: Plan, arms: Sequence[str]) -> list[AblationJob]:
    """The runs that choose each arm's learning rate, on `val` of the core regime."""
    core = plan.regimes[CORE]
    return [
        AblationJob(core, plan.arms[name], plan.selection_seed, rate, select=True)
        for name in arms
        if plan.arms[name].trains
        for rate in plan.learning_rates
    ]


def table_jobs(
    plan: Plan, arms: Sequence[str], regimes: Sequence[str], seeds: int | None, rates: dict[str, float]
) -> list[AblationJob]:
    """The runs of the table: seed by seed, the core regime first, so that a table stopped early is still paired.

    Args:
        plan: the plan.
        arms: those to run.
        regimes: those to run.
        seeds: at most so many seeds a regime; None runs all.
        rates: chosen learning rate by arm.
    """
    jobs: list[AblationJob] = []
    for regime in (plan.regimes[name] for name in plan.regimes if name in regimes):
        every = (*regime.seeds, *regime.more_seeds)
        for seed in every[:seeds]:
            for name in regime.arms:
                arm = plan.arms[name]
                wanted = seed in regime.seeds or name in regime.more_seeds_arms
                if name in arms and wanted and (arm.trains or seed == every[0]):
                    jobs.append(AblationJob(regime, arm, seed, rates.get(name, 0.0)))
    return jobs


def schedule(plan: Plan, job: AblationJob, stage: str) -> dict[str, Any]:
    """The optimiser steps of a stage (all, or distillation's share and the rest) and its learning rate."""
    both = "distill" in job.arm.stages and len({"align", "classifier"} & set(job.arm.stages)) > 0
    distilling = round(plan.steps * plan.distill_share) if both else plan.steps
    steps = distilling if stage == "distill" else plan.steps - (distilling if both else 0)
    if stage not in ("distill", "align", "classifier"):
        return {}
    rate = {"init_args": {"lr": job.learning_rate}}
    return {
        "trainer": {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 0},
        "model": {"init_args": {"optimizer": rate, "select": "last"}},
    }


def job_layers(plan: Plan, job: AblationJob, stage: str, preset: str) -> dict[str, Any]:
    """The merged layers of one stage of a job: the pipeline's own, the schedule, the arm's, the seed."""
    seed = {"seed_everything": job.seed, "data": {"init_args": {"seed": job.seed}}}
    return laid_over(stage_config(STAGES[stage], preset), schedule(plan, job, stage), job.arm.stages[stage], seed)


_UNHASHED = {
    "logger",
    "callbacks",
    "default_root_dir",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
}


def config_hash(plan: Plan, job: AblationJob, preset: str, data: str) -> str:
    """What decides a job's figures: the cohort (its hash), the merged layers of its stages, the regime and the expert.

    A default that changes in `stages/` changes the hash of the arms that rest on it, and of no other.
    """
    upstream = ("expert", "index") if job.arm.pool_matters else ()
    layers = {name: stage_config(STAGES[name], preset) for name in upstream}
    layers |= {name: job_layers(plan, job, name, preset) for name in job.arm.stages}
    for layer in layers.values():
        # null is the trainer's own default, as where nothing is said
        said = {key: value for key, value in layer["trainer"].items() if value is not None}
        layer["trainer"] = {key: value for key, value in said.items() if key not in _UNHASHED}
    return hash_json(
        {
            "data": data,
            "layers": layers,
            "seed": job.seed,
            "regime": [job.regime.pairs, job.regime.normals, job.regime.pool if job.arm.pool_matters else None],
            "expert": vars(plan.experts[job.regime.expert]) if job.arm.pool_matters else None,
        }
    )[:16]


def laid_over(base: dict[str, Any], *layers: dict[str, Any]) -> dict[str, Any]:
    """Several layers over one another, the last on top."""
    for layer in layers:
        base = merge(base, layer)
    return base
