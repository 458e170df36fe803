"""Rebuild a function: its body is cut out, its signature and docstring stay, and you write it anew."""

import math

import torch

from mechanics import exercise


@exercise(
    "rebuild", ["t5.Adapter.__call__"], level=1, minutes=10, paper="HINT, equation (1)",
    hint="Two products and an activation between them. The block adds the residual, so the adapter does not.",
    why="p, all numbers generated for one instruction, is 4 % of the N parameters of T5 XL, and they are new for each task.",
    near={
        "You add u to the result. The block has that residual already.":
            ("self.up) + self.up_bias", "self.up) + self.up_bias + u"),
        "Your activation is relu. Equation (1) has gelu.": ('F.gelu(hidden, approximate="tanh")', "F.relu(hidden)"),
        "Your first bias is added after the activation. It belongs inside.":
            (" + self.down_bias", "", 'F.gelu(hidden, approximate="tanh")', 'F.gelu(hidden, approximate="tanh") + self.down_bias'),
        "Your gelu is the exact one. T5 uses its tanh approximation.": ('F.gelu(hidden, approximate="tanh")', "F.gelu(hidden)"),
        "Your second bias is missing.": (" + self.up_bias", ""),
        "Your first bias is missing.": (" + self.down_bias", ""),
        "Every row gets the adapter of the first row. In a mixed batch each row has its own.":
            ("u, self.down)", "u, self.down[:1].expand(len(u), -1, -1))", "self.up)", "self.up[:1].expand(len(u), -1, -1))"),
        "There is no activation between your two products, so that they are one product.":
            ('F.gelu(hidden, approximate="tanh")', "hidden"),
    },
    also=[("t5.Adapter.__call__", """
        hidden = u @ self.down + self.down_bias
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return (0.5 * hidden * (1 + torch.tanh(inner))) @ self.up + self.up_bias
    """)],
)  # fmt: skip
def adapter(t5):
    """Write the adapter, a bottleneck beside the feed-forward layer: gelu(u W_down + b_down) W_up + b_up.

    The weights are generated. They have a batch axis: either one adapter for all rows, or one for each row.
    """
    d, r = 6, 4
    for batch in (3, 1):
        u = torch.randn(3, 5, d)
        down, down_bias = torch.randn(batch, d, r), torch.randn(batch, 1, r)
        up, up_bias = torch.randn(batch, r, d), torch.randn(batch, 1, d)
        wanted = torch.zeros(3, 5, d)
        for row in range(3):
            b = row if batch == 3 else 0
            for place in range(5):
                for j in range(r):
                    h = sum(u[row, place, i] * down[b, i, j] for i in range(d)) + down_bias[b, 0, j]
                    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                    wanted[row, place] += gelu * up[b, j]
                wanted[row, place] += up_bias[b, 0]
        found = t5.Adapter(down, down_bias, up, up_bias)(u)
        yield f"{'one adapter for each row' if batch == 3 else 'one adapter for all rows'}", found, wanted


@adapter.facts
def _(hint):
    config = hint.HINTConfig()
    model = hint.on_meta(hint.T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32), config)
    size = sum(parameter.numel() for parameter in model.t5.parameters())
    kinds = model.hypernetwork.kinds.values()
    generated = sum(kind.slots * kind.columns * kind.width for kind in kinds)
    yield "p / N at XL, percent", 100 * generated / size, "4 %"
