"""Search schedules with Optuna, with the same training function as in a comparison.

    python examples/18_optuna.py [--trials 20]

A search sees the test set many times, so its best result looks better than it is. Search on separate seeds, then
compare the schedule found with plain training on fresh seeds, as the last lines do.
"""

import runpy
from pathlib import Path

import optuna

from _data import command_line
from batchtrim.lab import compare, run_once

train = runpy.run_path(str(Path(__file__).with_name("16_own_regression.py")))["train"]


def main(trials: int = 12, epochs: int = 15, seeds: int = 5, out: str = "runs/optuna") -> float:
    def objective(trial: optuna.Trial) -> float:
        settings = {
            "keep_end": trial.suggest_float("keep_end", 0.1, 0.8),
            "schedule": trial.suggest_categorical("schedule", ["linear", "cosine", "step"]),
        }
        found = [run_once(train, "trim", seed, epochs=epochs, metric="rmse", **settings) for seed in (100, 101)]
        return sum(found) / len(found)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    print(f"found {study.best_params}, rmse {study.best_value:.3f} on the seeds of the search")
    summary = compare(train, ["full", "trim"], seeds, epochs=epochs, metric="rmse", out=out, **study.best_params)
    for arm in summary.groups[0].arms:
        print(f"{arm.label}: rmse {arm.moments.mean:.3f} on fresh seeds")
    return float(study.best_value)


if __name__ == "__main__":
    command_line(main)
