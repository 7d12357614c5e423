"""Read a run's event files back with TensorBoard itself, and compare them with metrics.jsonl and samples/.

    pip install tensorboard
    python tools/check_tensorboard.py RUN
"""
import json, os, struct, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = sys.argv[1]
events = EventAccumulator(os.path.join(run, "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
expected = {}
with open(os.path.join(run, "metrics.jsonl")) as lines:
    for row in map(json.loads, lines):
        expected.update({(k, row["step"]): v for k, v in row.items() if k != "step" and isinstance(v, (int, float))})
single = lambda x: struct.unpack("f", struct.pack("f", x))[0]
wrong = [k for k in expected.keys() | found.keys() if k not in expected or k not in found or single(expected[k]) != found[k]]
images = {e.step: e.encoded_image_string for e in events.Images("samples")} if "samples" in events.Tags()["images"] else {}
for name in sorted(os.listdir(os.path.join(run, "samples"))) if os.path.isdir(os.path.join(run, "samples")) else []:
    with open(os.path.join(run, "samples", name), "rb") as f:
        if images.get(int(name[5:-4])) != f.read():
            wrong.append(("samples", name))
print(f"{len(found)} scalars of {len(events.Tags()['scalars'])} tags, {len(images)} images; differences: {wrong[:5] or 'none'}")
sys.exit(bool(wrong))
