"""Which differences between two stacks are real, on a workload that is drawn eight times?"""

from pathlib import Path

from rota.serving.sim.run import SimulationConfig
from rota.serving.stack import load_stack
from rota.serving.studies.compare import compare
from rota.serving.studies.compare_report import label, sentence
from rota.serving.studies.runner import LocalRunner

HERE = Path(__file__).parent


def main() -> None:
    stacks = {"default": load_stack(None), "stall_free": load_stack(HERE / "stall_free.toml")}
    common = SimulationConfig(trace=HERE / "mixed.toml", num_requests=400, num_instances=2)
    with LocalRunner() as runner:
        comparison, _ = compare(stacks, common, runner, num_repeats=8)
    for one in comparison.differences:
        if one.group == "all":
            print(f"{label(one):<14}  {one.stack}: {sentence(one)}")


if __name__ == "__main__":  # worker processes import this file
    main()
