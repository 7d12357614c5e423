//! What wrappers of a model put before the names of its tensors.

/// torch.compile, DistributedDataParallel; and torch.compile where a dot was written as an underscore (kohya's scripts).
const WRAPPERS: [(&str, char); 3] = [("_orig_mod.", '.'), ("module.", '.'), ("_orig_mod_", '_')];

/// The name that a tensor had before its model was wrapped, wherever in it the wrappers are.
pub fn unwrapped(key: &str) -> String {
    let mut key = key.to_owned();
    for (wrapper, between) in WRAPPERS {
        let is_a_word = |key: &str, at: usize| at == 0 || key[..at].ends_with(between);
        while let Some((at, _)) = key.match_indices(wrapper).find(|&(at, _)| is_a_word(&key, at)) {
            key.replace_range(at..at + wrapper.len(), "");
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use super::unwrapped;

    #[test]
    fn only_whole_words_are_taken_out() {
        for (wrapped, plain) in [
            ("_orig_mod.conv_in.weight", "conv_in.weight"),
            ("module._orig_mod.a.module.b", "a.b"),
            ("model.diffusion_model._orig_mod.out", "model.diffusion_model.out"),
            ("lora_unet__orig_mod_mid_block", "lora_unet_mid_block"),
            ("motion_module.a", "motion_module.a"),
            ("motion_modules.a", "motion_modules.a"),
            ("a.module", "a.module"),
            ("", ""),
        ] {
            assert_eq!(unwrapped(wrapped), plain, "{wrapped}");
        }
    }
}
