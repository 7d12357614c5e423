#!/usr/bin/env python3
"""What one optimizer step asks of a GPU, as Markdown, from the log (STANDIN_LOG) of `alignprop bench` on the stand-in.

    STANDIN=count STANDIN_LOG=LOG alignprop bench --device cuda ... && summary.py LOG

The last step of the bench is taken: its four phases end with a wait each. Least times are those of a card that moves 3 TB/s
and multiplies bf16 at 790 TFLOP/s and f32 at 60, each launch by itself; they are no measurement of any card.
"""

import json
import sys

PHASES = ["rollout", "kept steps", "VAE and reward", "backprop and update"]

with open(sys.argv[1]) as log:
    lines = [line for line in map(json.loads, log) if line["kernels"] or line["graphs"]]
step = lines[-4:]

print("| phase | kernels | launches by the host | allocations | GB | TFLOP | least ms |")
print("|---|---|---|---|---|---|---|")
total = [0] * 6
for name, line in zip(PHASES, step):
    kernels = line["kernels"].values()
    count = sum(k[0] for k in kernels)
    row = [count, count - line["in_graphs"] + line["graphs"], line["allocations"], sum(k[1] for k in kernels) / 1e9,
           sum(k[2] for k in kernels) / 1e12, 1e3 * sum(k[3] for k in kernels)]
    total = [a + b for a, b in zip(total, row)]
    print("| {} | {:,} | {:,} | {:,} | {:.1f} | {:.2f} | {:.1f} |".format(name, *row))
print("| all | {:,} | {:,} | {:,} | {:.1f} | {:.2f} | {:.1f} |".format(*total))
print()

kernels = {}
for line in step:
    for name, values in line["kernels"].items():
        kernels[name] = [a + b for a, b in zip(kernels.get(name, [0] * 4), values)]
print("| kernel | times | GB | TFLOP | least ms |")
print("|---|---|---|---|---|")
rest = [0] * 4
for name, values in sorted(kernels.items(), key=lambda item: -item[1][3]):
    if values[3] < 0.005 * total[5] / 1e3:
        rest = [a + b for a, b in zip(rest, values)]
        continue
    print("| `{}` | {:,} | {:.1f} | {:.2f} | {:.1f} |".format(name, values[0], values[1] / 1e9, values[2] / 1e12, 1e3 * values[3]))
print("| others | {:,} | {:.1f} | {:.2f} | {:.1f} |".format(rest[0], rest[1] / 1e9, rest[2] / 1e12, 1e3 * rest[3]))
print()
print(f"At most {max(line['peak'] for line in step) / 2**20:,.0f} MiB allocated; to the device "
      f"{sum(line['to_device'] for line in step):,} bytes, from it {sum(line['from_device'] for line in step):,}.")
