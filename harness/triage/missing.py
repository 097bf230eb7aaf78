"""What a case asked for and its observation does not have."""

from __future__ import annotations

from harness.schema import Case, ChainCase, Observation, ProbeCase, ServeCase, TrainCase


def missing(case: Case, observation: Observation) -> list[str]:
    """Sentences, one for each thing asked that was not measured; none where all of it was."""
    if isinstance(case, TrainCase):
        return _training(case, observation, "none")
    if isinstance(case, ServeCase):
        return _serving(observation)
    if isinstance(case, ProbeCase):
        return _probing(case, observation)
    return [*_training(case.train, observation, case.serve.adapter), *_serving(observation)]


def _training(case: TrainCase, observation: Observation, hand_over: str) -> list[str]:
    train = observation.train
    if train is None:
        return ["the training job left no events"]
    wanted = {
        f"{case.devices} ranks were asked for, {len(observation.ranks)} left events": len(observation.ranks)
        >= case.devices,
        "what was proven before the first step differs from what was asked": not train.proof_mismatches,
        "the ranks have different versions installed": not observation.odd_ranks,
        "nothing was proven before the first step": bool(train.proof),
        "a loss or gradient was not finite": train.nonfinite is None,
        "the evaluation left no loss": train.eval_loss is not None,
        "no checkpoint was saved": train.checkpoint_bytes is not None,
        "the saved model was not reloaded and found equal": train.reload_ok is True,
        "no merged model was made": hand_over != "merged" or train.merge_s is not None,
    }
    return [*(sentence for sentence, there in wanted.items() if not there), *_ranks(case, observation)]


def _ranks(case: TrainCase, observation: Observation) -> list[str]:
    """Ranks that did not reach the last step, or their last line."""
    found = []
    for rank in observation.ranks:
        last = max(rank.steps.step, default=0)
        if last < case.steps:
            found.append(f"rank {rank.rank} finished {last} of {case.steps} steps")
        elif not any(step > case.warmup_steps for step in rank.steps.step):
            found.append(f"rank {rank.rank} has no step after the warm-up")
        if not rank.ended:
            found.append(f"rank {rank.rank} did not reach its end")
    return found


def _serving(observation: Observation) -> list[str]:
    serve = observation.serve
    if serve is None:
        return ["the serving job left no events"]
    load, smoke = serve.load, serve.smoke
    wanted = {
        "the server never said that it was ready": serve.ready_s is not None,
        "the load point was not measured": load is not None,
        f"{load.failed if load else 0} requests failed": not load or load.failed == 0,
        "no request of the load was completed": not load or load.completed > 0,
        "the load generated no token": not load or load.output_tokens > 0,
        "the smoke request was not made": smoke is not None,
        f"the smoke request failed: {_failed_checks(observation)}": not smoke or smoke.ok,
    }
    return [sentence for sentence, there in wanted.items() if not there]


def _failed_checks(observation: Observation) -> str:
    smoke = observation.serve.smoke if observation.serve else None
    failed = [name for name, passed in smoke.checks.items() if not passed] if smoke else []
    return ", ".join(failed) or "no answer"


def _probing(case: ProbeCase, observation: Observation) -> list[str]:
    probe = observation.probe
    if probe is None:
        return ["the probe left no events"]
    wrong = [check for check in probe.checks if not check.ok]
    short = [size for size in case.sizes_bytes if sum(one.size_bytes == size for one in probe.series) < case.devices]
    wanted = {
        f"{case.devices} ranks were asked for, {len(observation.ranks)} left events": len(observation.ranks)
        >= case.devices,
        "nothing was proven before the first measurement": bool(probe.proof),
        **{f"rank {one.rank} found {one.found} for {one.name}, not {one.expected}": False for one in wrong[:4]},
        "no known sum was checked": bool(probe.checks),
        f"{len(short)} of {len(case.sizes_bytes)} sizes were not measured on every rank": not short,
    }
    late = [f"rank {rank.rank} did not reach its end" for rank in observation.ranks if not rank.ended]
    return [*_not_set(case, observation), *(said for said, there in wanted.items() if not there), *late]


def _not_set(case: ProbeCase, observation: Observation) -> list[str]:
    """What was proven to differ from what was asked, by the payload or by NCCL's own log."""
    found = list(observation.probe.proof_mismatches) if observation.probe else []
    nccl = observation.nccl
    direct = [name for name in nccl.transports if name.startswith("P2P")] if nccl else []
    if direct and not case.p2p:
        found.append(f"P2P was to be off, and NCCL connects ranks by {', '.join(direct)}")
    if nccl and nccl.interfaces and case.interface and case.interface not in nccl.interfaces:
        found.append(f"NCCL uses {', '.join(nccl.interfaces)}, not {case.interface}")
    return found


def training_of(case: Case) -> TrainCase | None:
    """The training half of a case."""
    return case.train if isinstance(case, ChainCase) else case if isinstance(case, TrainCase) else None


def ranks_of(case: Case) -> int:
    """Ranks of a training case, a chain's training or a probe; none of a server."""
    train = training_of(case)
    return case.devices if isinstance(case, ProbeCase) else train.devices if train else 0


def serving_of(case: Case) -> ServeCase | None:
    """The serving half of a case."""
    return case.serve if isinstance(case, ChainCase) else case if isinstance(case, ServeCase) else None
