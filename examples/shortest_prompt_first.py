"""A policy of your own: short prompts first.

`examples/shortest_prompt_first.toml` names this class, so every host can be given it:

    PYTHONPATH=examples rota simulate --trace examples/mixed.toml --stack examples/shortest_prompt_first.toml
    PYTHONPATH=examples rota serve --stack examples/shortest_prompt_first.toml
"""

from rota.serving.api import Capability, InOrder, Pool


class ShortestPromptFirst:
    """Admit the waiting sequence with the shortest prompt first. Starves long prompts while short ones keep coming."""

    requires = frozenset({Capability.ORDER_WAITING})
    running_order = "admission"
    displacing = False

    def open(self, view, pool):
        if pool is Pool.RUNNING:
            return InOrder(view.running)
        return InOrder(sorted(view.waiting, key=lambda sequence: (sequence.num_prompt_tokens, sequence.queue_position)))

    def displaces(self, view, waiting, running):
        return False


if __name__ == "__main__":
    from rota.testing.order import check_order_policy

    check_order_policy(ShortestPromptFirst)
    print("ShortestPromptFirst keeps every law that an order policy has to keep")
