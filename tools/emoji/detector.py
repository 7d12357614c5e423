"""The two detectors: `detector`, a reward, and `detector_judge`, never trained against. YOLOS in the layout of transformers,
whose classes are the animals.

Each starts from the vision tower of the contrastive model of its own half, because a transformer that learns to see and to match
boxes at the same time is slow. For the same reason each detection token has a home on a grid of ANCHORS: it begins with the position
embedding of that place, and at first an animal belongs to the token next to it; the pull of the homes goes to zero by the middle of
the training, and the matching is DETR's from then on.
"""
import time
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou
from transformers import YolosConfig, YolosForObjectDetection
import clip, data
from common import Average, Training, averaged, to_float

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the image processor's
MODELS = {"detector": dict(start="clip", seed=8, steps=2000), "detector_judge": dict(start="judge", seed=9, steps=2000)}
ANCHORS = [((i + 0.5) / 4, (j + 0.5) / 3) for j in range(3) for i in range(4)]
THRESHOLD = 0.5
NONE_WEIGHT, PULL = 0.4, 20.0


def new(kind):
    m = clip.MODELS[MODELS[kind]["start"]]
    return YolosForObjectDetection(YolosConfig(
        hidden_size=m["width"], num_hidden_layers=m["layers"], num_attention_heads=m["heads"], intermediate_size=4 * m["width"], hidden_act="gelu",
        image_size=[data.SIZE, data.SIZE], patch_size=clip.PATCH, num_detection_tokens=len(ANCHORS), use_mid_position_embeddings=False,
        id2label=dict(enumerate(data.KINDS)), label2id={k: i for i, k in enumerate(data.KINDS)}))


def with_head(kind):
    """The model, and the head for what each patch shows, which is used in training only."""
    return torch.nn.ModuleDict({"model": new(kind), "patches": torch.nn.Linear(clip.MODELS[MODELS[kind]["start"]]["width"], clip.KINDS + 6)})


def normalise(x):
    """-1..1 to the detector's input."""
    return ((x + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def take_over(both, source, x):
    """The weights of the contrastive model `source` (with its heads). CLIP's norm before the first layer, which YOLOS has not,
    becomes the affine map that it is on average over the pictures x."""
    vision, vit = source["model"].vision_model, both["model"].vit
    norm, hidden = vision.pre_layrnorm, vision.embeddings(clip.normalise(x))
    scale = norm.weight / hidden.std(-1, correction=0).mean()
    centred = lambda w: w - w.mean(0)  # over the width, which comes first
    ratio = (torch.tensor(STD) / torch.tensor(clip.STD))[:, None, None]
    shift = ((torch.tensor(MEAN) - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD))[:, None, None]
    patch = scale[:, None, None, None] * centred(vision.embeddings.patch_embedding.weight)
    positions = scale * centred(vision.embeddings.position_embedding.weight.T).T + norm.bias
    projection = vit.embeddings.patch_embeddings.projection
    projection.weight.copy_(patch * ratio)
    projection.bias.copy_((patch * shift).sum((1, 2, 3)))
    vit.embeddings.cls_token.copy_(scale * centred(vision.embeddings.class_embedding))
    grid = positions[1:].T.view(1, -1, clip.GRID, clip.GRID)
    homes = F.grid_sample(grid, torch.tensor(ANCHORS)[None, None] * 2 - 1, align_corners=False, padding_mode="border")[0, :, 0].T
    vit.embeddings.position_embeddings.copy_(torch.cat([positions, homes])[None])
    vit.embeddings.detection_tokens.normal_(std=0.1)
    vit.layernorm.load_state_dict(vision.post_layernorm.state_dict())
    both["patches"].load_state_dict(source["heads"]["patches"].state_dict())
    names = {"layernorm_before": "layer_norm1", "layernorm_after": "layer_norm2", "attention.attention.query": "self_attn.q_proj", "attention.attention.key": "self_attn.k_proj",
             "attention.attention.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
    for a, b in zip(vit.encoder.layer, vision.encoder.layers):
        for to, of in names.items():
            a.get_submodule(to).load_state_dict(b.get_submodule(of).state_dict())


def forward(both, x):
    """(class logits, boxes, patch logits)"""
    tokens = both["model"].vit(pixel_values=normalise(x)).last_hidden_state
    found = tokens[:, -len(ANCHORS):]
    return both["model"].class_labels_classifier(found), both["model"].bbox_predictor(found).sigmoid(), both["patches"](tokens[:, 1:-len(ANCHORS)])


def corners(boxes):
    return box_convert(boxes, "cxcywh", "xyxy")


def loss(logits, boxes, true_boxes, classes, pull):
    """DETR's loss with its matching, to whose costs `pull` times the distance from each token's home is added: (of classes, of boxes)."""
    homes = torch.tensor(ANCHORS)
    image, token, target = [], [], []
    with torch.no_grad():
        probabilities = logits.softmax(-1)
        for b in range(len(logits)):
            n = int((classes[b] >= 0).sum())
            own = true_boxes[b, :n]
            cost = 5 * torch.cdist(boxes[b], own, p=1) - 2 * generalized_box_iou(corners(boxes[b]), corners(own)) - 2 * probabilities[b][:, classes[b, :n]]
            rows, columns = linear_sum_assignment((cost + pull * torch.cdist(homes, own[:, :2])).numpy())
            image += [b] * n
            token += rows.tolist()
            target += columns.tolist()
    goal = torch.full(logits.shape[:2], clip.KINDS)
    goal[image, token] = classes[image, target]
    weight = torch.ones(clip.KINDS + 1)
    weight[-1] = NONE_WEIGHT
    predicted, own = boxes[image, token], true_boxes[image, target]
    giou = torch.diagonal(generalized_box_iou(corners(predicted), corners(own)))
    return F.cross_entropy(logits.flatten(0, 1), goal.flatten(), weight), 5 * (predicted - own).abs().sum(-1).mean() + 2 * (1 - giou).mean()


@torch.no_grad()
def counts(model, pictures, size=100):
    """(N, 20): of each animal, how many detections have it as their likeliest class with at least THRESHOLD."""
    out = []
    for i in range(0, len(pictures), size):
        p, best = model(pixel_values=normalise(to_float(pictures[i:i + size]))).logits.softmax(-1)[..., :-1].max(-1)
        out.append((F.one_hot(best, clip.KINDS) * (p >= THRESHOLD)[..., None]).sum(1))
    return torch.cat(out).numpy()


def exact(model, scenes, count):
    """Of the first `count` scenes: whether the number of each animal is right, and the number of animals in the scene."""
    some = data.Scenes(*(f[:count] for f in scenes))
    true = some.counts()
    return (counts(model, some.pictures) == true).all(1), true.sum(1)


def train(folder, kind, minutes, log):
    m = MODELS[kind]
    torch.manual_seed(m["seed"])
    scenes, test = data.load(folder), data.load_held_out(folder)
    half, art, scaled = clip.MODELS[m["start"]]["half"], data.artwork(folder), {}
    mine, coded = np.flatnonzero(scenes.half == half), clip.reconstructions(folder, half)
    both = with_head(kind)
    take_over(both, clip.load(folder, m["start"], heads=True)[0], to_float(scenes.pictures[mine[:256]]))
    muon, adam = clip.optimizers(both, lambda name: ".encoder." in name or ".layers.0" in name or ".layers.1" in name)
    average = Average(both, 0.995)
    training = Training(folder, kind, m["steps"], m["seed"], minutes, both, average, muon=muon, adam=adam)
    begin, sums = time.time(), []

    def report():
        live = with_head(kind)
        live.load_state_dict(average.weights)
        right, totals = exact(live["model"].eval(), test, 2000 if training.step == training.steps else 400)
        log(stage=kind, step=training.step, share=training.share, seconds=time.time() - begin, **dict(zip(("classes", "boxes", "dense"), np.mean(sums, 0).tolist())),
            exact=float(right.mean()), exact_by_count=[float(right[totals == n].mean()) for n in range(1, data.MOST + 1)])
        sums.clear()

    for step, rng in training:
        i = rng.choice(mine, clip.BATCH, replace=False)
        some = clip.batch(scenes, i, clip.BATCH // 4, half, art, scaled, rng, coded)
        true_boxes, classes = torch.from_numpy(some.boxes), torch.from_numpy(some.classes.astype(np.int64))
        logits, boxes, patches = forward(both, clip.augment(to_float(some.pictures), rng))
        losses = [*loss(logits, boxes, true_boxes, classes, PULL * max(0.0, 1 - 2 * training.share)), clip.dense(patches, clip.dense_targets(true_boxes, classes))]
        both.zero_grad()
        (4 * losses[0] + losses[1] + losses[2]).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 2.0)
        clip.step_all((muon, adam), step, training.steps)
        average.update(both)
        sums.append([l.item() for l in losses])
        if step % 100 == 99 and step + 1 < training.steps:
            report()
    if sums:
        report()


def load(folder, kind):
    """The model with averaged weights."""
    both = with_head(kind)
    both.load_state_dict(averaged(folder, kind)[0])
    return both["model"].eval().requires_grad_(False)
