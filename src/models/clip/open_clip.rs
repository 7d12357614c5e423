//! The names of transformers' `CLIPModel` for the tensors of an open_clip `state_dict`.

use anyhow::{Result, ensure};

use crate::models::Weights;
use crate::models::weights::Renamed;

/// The text tower's first `layers` layers, without its projection.
///
/// # Errors
/// The matrix of q, k and v does not divide into three.
pub(in crate::models) fn text(w: &Weights, layers: usize) -> Result<Vec<Renamed>> {
    let mut names = blocks(w, "transformer", "text_model.encoder", layers)?;
    names.push(whole("token_embedding.weight", "text_model.embeddings.token_embedding.weight"));
    names.push(whole("positional_embedding", "text_model.embeddings.position_embedding.weight"));
    names.extend(both("ln_final", "text_model.final_layer_norm"));
    Ok(names)
}

/// The vision tower.
///
/// # Errors
/// As [`text`].
pub(super) fn vision(w: &Weights, layers: usize) -> Result<Vec<Renamed>> {
    let mut names = blocks(w, "visual.transformer", "vision_model.encoder", layers)?;
    for (from, to) in [
        ("class_embedding", "class_embedding"),
        ("conv1.weight", "patch_embedding.weight"),
        ("positional_embedding", "position_embedding.weight"),
    ] {
        names.push(whole(&format!("visual.{from}"), &format!("vision_model.embeddings.{to}")));
    }
    names.extend(both("visual.ln_pre", "vision_model.pre_layrnorm")); // sic
    names.extend(both("visual.ln_post", "vision_model.post_layernorm"));
    Ok(names)
}

/// The text tower's projection, a matrix (C, D), as the linear layer that transformers has.
pub(in crate::models) fn text_projection() -> Renamed {
    Renamed { transposed: true, ..whole("text_projection", "text_projection.weight") }
}

/// Both projections, which open_clip stores as matrices (C, D) and not as linear layers.
pub(super) fn projections() -> [Renamed; 2] {
    [whole("text_projection", "text_projection"), whole("visual.proj", "visual_projection")]
}

fn blocks(w: &Weights, from: &str, to: &str, layers: usize) -> Result<Vec<Renamed>> {
    let mut names = Vec::new();
    for layer in 0..layers {
        let (from, to) = (format!("{from}.resblocks.{layer}"), format!("{to}.layers.{layer}"));
        for (old, new) in [
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("attn.out_proj", "self_attn.out_proj"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ] {
            names.extend(both(&format!("{from}.{old}"), &format!("{to}.{new}")));
        }
        for tensor in ["weight", "bias"] {
            let from = format!("{from}.attn.in_proj_{tensor}");
            let rows = w.shape(&from).and_then(|shape| shape.first().copied()).unwrap_or(0);
            let third = rows / 3;
            ensure!(third > 0 && rows.is_multiple_of(3), "{}: `{}.{from}` has {rows} rows", w.file(), w.prefix());
            for (i, projection) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                let to = format!("{to}.self_attn.{projection}.{tensor}");
                names.push(Renamed { rows: Some(i * third..(i + 1) * third), ..whole(&from, &to) });
            }
        }
    }
    Ok(names)
}

fn whole(from: &str, to: &str) -> Renamed {
    Renamed { from: from.to_owned(), to: to.to_owned(), ..Default::default() }
}

/// A layer's weight and bias.
fn both(from: &str, to: &str) -> [Renamed; 2] {
    ["weight", "bias"].map(|tensor| whole(&format!("{from}.{tensor}"), &format!("{to}.{tensor}")))
}
