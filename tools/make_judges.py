"""Make the small sets of the judges that run forward only: random tiny models and their numbers.

    pip install torch transformers pillow safetensors
    python tools/make_judges.py tests/fixtures

bertscore   a set that `alignprop verify` reads: bert/ (with the prefix and the norms' old names of early checkpoints), deberta/ (with the
            convolution of deberta-v2-xlarge), and of each the ids, hidden states and scores of some pairs of texts, in float64, by the
            rules of the bert-score package: reference.json has the pairs
blip        a BlipForConditionalGeneration; pictures.safetensors has two pictures in bytes, their pixels as its processor makes them, and the
            ids of their captions by greedy search; captions.json has the texts

The result is committed, so building and testing never need this file.
"""
import json, math, os, string, sys
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (BertConfig, BertForMaskedLM, BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, DebertaV2Config,
                          DebertaV2Model, DebertaV2Tokenizer)

WORDS = "a the of in on and two three cat dog fox bird beach snow image contains ##s ##ing play sit red blue small picture is with".split()
PAIRS = [("a cat on the beach", "The image contains a cat in the snow"), ("a dog", "a dog"), ("", "a fox"), (" two  dogs\nplaying ", "Two dogs, playing!"),
         ("a bird", "   "), ("Café 猫 #2", "a [SEP] cafe"), ("a small red fox sits in the snow, " * 6, "a fox and " + "a " * 40 + "dog")]
LIMIT = 32


def randomise(module):
    for name, p in module.named_parameters():
        if p.ndim == 1:
            p.data = 0.1 * torch.randn_like(p) + (1.0 if name.endswith("weight") else 0.0)
        else:
            p.data = torch.randn_like(p) / math.sqrt(p.shape[-1] if p.ndim < 4 else p[0].numel())
    return module.eval().requires_grad_(False)


def bert_words():
    singles = list(string.ascii_lowercase + string.digits)
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + list(string.punctuation) + singles + ["##" + c for c in singles] + WORDS))


def greedy(c, r, keep_c, keep_r):
    c, r = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (c, r))
    if not keep_c.any() or not keep_r.any():
        return torch.zeros(3, dtype=c.dtype)
    sim = c @ r.T
    p, r = sim.max(1).values[keep_c].mean(), sim.max(0).values[keep_r].mean()
    return torch.stack([p, r, 2 * p * r / (p + r)])


def bertscore(out):
    torch.manual_seed(1)
    layers = 2
    words = bert_words()
    os.makedirs(f"{out}/bert", exist_ok=True)
    bert_tok = BertTokenizer(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True, model_max_length=LIMIT)
    bert_tok.save_pretrained(f"{out}/bert")
    bert = randomise(BertForMaskedLM(BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=layers + 1, num_attention_heads=3, intermediate_size=40, max_position_embeddings=40)))
    bert.save_pretrained(f"{out}/bert")
    file = f"{out}/bert/model.safetensors"
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    save_file({old(name): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    pieces = ["▁" + w for w in WORDS if not w.startswith("##")] + ["▁The", "▁Two", "▁", "s", "ing"] + list(string.ascii_letters + string.digits + string.punctuation)
    vocab = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0)] + [(p, -2.0 - 0.01 * i - (4.0 if len(p) == 1 else 0.0)) for i, p in enumerate(dict.fromkeys(pieces))] + [("[MASK]", 0.0)]
    deberta_tok = DebertaV2Tokenizer(vocab=vocab, unk_id=3, model_max_length=LIMIT)
    deberta_tok.save_pretrained(f"{out}/deberta")
    deberta = randomise(DebertaV2Model(DebertaV2Config(
        vocab_size=len(vocab), hidden_size=24, num_hidden_layers=layers + 1, num_attention_heads=3, intermediate_size=40, type_vocab_size=0, layer_norm_eps=1e-7, pad_token_id=0,
        relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, max_position_embeddings=40,
        conv_kernel_size=3, conv_act="gelu")))
    deberta.save_pretrained(f"{out}/deberta")
    for name, model, tok in (("bert", bert.bert, bert_tok), ("deberta", deberta, deberta_tok)):
        model = model.double()
        model.encoder.layer = model.encoder.layer[:layers]
        special, tensors, scores = {tok.cls_token_id, tok.sep_token_id}, {}, []
        for n, pair in enumerate(PAIRS):
            sides = []
            for side, text in zip(("candidate", "reference"), pair):
                ids = torch.tensor([tok.encode(text.strip(), add_special_tokens=True, truncation=True, max_length=LIMIT)])
                hidden = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
                sides.append((hidden, torch.tensor([i not in special for i in ids[0].tolist()])))
                tensors[f"{side}_ids_{n}"] = ids[0]
                if n in (0, 6):
                    tensors[f"{side}_embeds_{n}"] = hidden.float()
            (c, keep_c), (r, keep_r) = sides
            scores.append(greedy(c, r, keep_c, keep_r))
        save_file(tensors | {"precision_recall_f1": torch.stack(scores).float()}, f"{out}/{name}.safetensors")
    pairs = [dict(candidate=c, reference=r) for c, r in PAIRS]
    json.dump(dict(kind="bertscore", pairs=pairs, max_length=LIMIT, num_layers=layers), open(f"{out}/reference.json", "w"), indent=1, ensure_ascii=False)


def blip(out):
    torch.manual_seed(7)
    os.makedirs(out, exist_ok=True)
    words = bert_words()
    tok = BertTokenizer(vocab={w: i for i, w in enumerate(words)}, do_lower_case=True)
    tok.add_special_tokens({"bos_token": "[DEC]"})
    tok.save_pretrained(out)
    text = dict(vocab_size=len(tok), hidden_size=24, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=24,
                bos_token_id=tok.convert_tokens_to_ids("[DEC]"), sep_token_id=tok.sep_token_id, eos_token_id=tok.sep_token_id, pad_token_id=0, is_decoder=True)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8)
    model = randomise(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)))
    embeddings = model.text_decoder.bert.embeddings
    embeddings.position_embeddings.weight.data *= 4  # another token at each place
    embeddings.word_embeddings.weight.data *= 2  # the head's weights too: clear choices
    model.save_pretrained(out)
    processor = BlipImageProcessor(size=dict(height=32, width=32))
    processor.save_pretrained(out)
    rng = np.random.default_rng(2)
    tensors, captions = {}, []
    for n in range(2):
        picture = rng.integers(0, 256, (7, 5, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
        ids = model.generate(pixel_values=pixels, max_length=12, num_beams=1, do_sample=False)[0]
        # the likeliest token must be so by far more than roundings
        logits = model.text_decoder(ids[None, :-1], encoder_hidden_states=model.vision_model(pixels).last_hidden_state).logits[0]
        best = logits.topk(2).values
        print("margins", (best[:, 0] - best[:, 1]).min().item(), ids.tolist())
        tensors |= {f"picture_{n}": torch.from_numpy(picture.copy()), f"pixels_{n}": pixels[0], f"ids_{n}": ids}
        captions.append(tok.decode(ids, skip_special_tokens=True))
    save_file(tensors, f"{out}/pictures.safetensors")
    json.dump(captions, open(f"{out}/captions.json", "w"))


if __name__ == "__main__":
    bertscore(f"{sys.argv[1]}/bertscore")
    blip(f"{sys.argv[1]}/blip")
