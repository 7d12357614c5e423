//! Training that goes on from an adapter made elsewhere: what the config says must be true of it, what the config leaves
//! open is taken from it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, bail};

use super::{Adapters, Target};
use crate::config::LoraConfig;

/// The ends of the names of all layers that can be adapted.
const LAYERS: [&str; 8] = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"];

/// `[lora]` with the keys that are absent filled in from the adapters of a file. A rank or alpha that is not the same for all
/// layers has no key: it stays absent.
///
/// # Errors
/// `lora.rank`, `lora.alpha` or `lora.target_modules` is given and says something else than the file: names both.
pub fn take_over(config: &LoraConfig, adapters: &Adapters, targets: &[Target], file: &Path) -> Result<LoraConfig> {
    let (mut filled, file) = (config.clone(), file.display());
    for factor in adapters.factors() {
        let module = &factor.module;
        if let Some(rank) = config.rank.filter(|rank| *rank != factor.rank()) {
            bail!(
                "lora.rank = {rank}, but {file} has rank {} (at `{module}`): leave lora.rank out to go on with the file's, \
                 or make another file with `alignprop soup {file}=1 --rank {rank} -o FILE`",
                factor.rank()
            );
        }
        if let Some(alpha) = config.alpha.filter(|alpha| (alpha - factor.alpha).abs() > 1e-6 * alpha.abs()) {
            bail!(
                "lora.alpha = {alpha}, but {file} has alpha {} (at `{module}`): leave lora.alpha out to go on with the file's",
                factor.alpha
            );
        }
    }
    let modules = |names: &[String]| -> BTreeSet<&str> {
        targets.iter().filter(|target| target.matches(names)).map(|target| target.module.as_str()).collect()
    };
    let adapted: BTreeSet<&str> = adapters.factors().iter().map(|factor| factor.module.as_str()).collect();
    match &config.target_modules {
        Some(names) => {
            let wanted = modules(names);
            if let Some(module) = wanted.difference(&adapted).next() {
                bail!(
                    "lora.target_modules = {names:?} names `{module}`, which {file} does not adapt: leave \
                     lora.target_modules out to train the file's layers"
                );
            }
            if let Some(module) = adapted.difference(&wanted).next() {
                bail!(
                    "{file} adapts `{module}`, which lora.target_modules = {names:?} does not name: leave \
                     lora.target_modules out to train the file's layers"
                );
            }
        }
        None => {
            let ends = LAYERS.map(str::to_owned);
            let named = |end: &String| adapted.iter().any(|module| module.ends_with(&format!(".{end}")));
            let ends: Vec<String> = ends.into_iter().filter(named).collect();
            let whole = adapted.iter().map(|module| (*module).to_owned());
            filled.target_modules = Some(if modules(&ends) == adapted { ends } else { whole.collect() });
        }
    }
    let (mut ranks, mut alphas): (Vec<usize>, Vec<f64>) =
        adapters.factors().iter().map(|factor| (factor.rank(), factor.alpha)).unzip();
    ranks.dedup();
    alphas.dedup();
    if let [rank] = ranks[..] {
        filled.rank = Some(rank);
    }
    if let [alpha] = alphas[..] {
        filled.alpha = Some(alpha);
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Factor;
    use candle_core::{DType, Device, Tensor};

    fn adapters(layers: &[(&str, usize, f64)]) -> Adapters {
        let zeros = |shape| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let factor = |&(module, rank, alpha): &(&str, usize, f64)| {
            Factor::new(module, zeros((rank, 6)), zeros((5, rank)), alpha).unwrap()
        };
        Adapters::new(layers.iter().map(factor).collect()).unwrap()
    }

    fn targets() -> Vec<Target> {
        let names = ["a.to_q", "a.to_k", "b.to_q", "a.proj_in"].map(str::to_owned);
        names.map(|module| Target { module, in_features: 6, out_features: 5, convolution: false }).to_vec()
    }

    fn take(config: LoraConfig, layers: &[(&str, usize, f64)]) -> Result<LoraConfig, String> {
        take_over(&config, &adapters(layers), &targets(), Path::new("x.safetensors")).map_err(|error| error.to_string())
    }

    fn names(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_the_config_leaves_open_is_the_files() {
        let open = LoraConfig::default();
        let config = take(open.clone(), &[("a.to_q", 8, 4.0), ("b.to_q", 8, 4.0)]).unwrap();
        assert_eq!((config.rank, config.alpha, config.target_modules), (Some(8), Some(4.0), names(&["to_q"])));
        // a layer alone, and ranks that differ
        let config = take(open, &[("a.to_q", 8, 4.0), ("a.proj_in", 2, 4.0)]).unwrap();
        assert_eq!((config.rank, config.alpha), (None, Some(4.0)));
        assert_eq!(config.target_modules, names(&["a.proj_in", "a.to_q"]));
    }

    #[test]
    fn what_the_config_says_must_be_true_of_the_file() {
        let file = [("a.to_q", 8, 4.0), ("b.to_q", 8, 4.0)];
        let same =
            LoraConfig { rank: Some(8), alpha: Some(4.0), target_modules: names(&["to_q"]), ..LoraConfig::default() };
        assert_eq!(take(same.clone(), &file).unwrap(), same);
        let e = take(LoraConfig { rank: Some(4), ..same.clone() }, &file).unwrap_err();
        assert!(e.contains("lora.rank = 4") && e.contains("x.safetensors has rank 8"), "{e}");
        let e = take(LoraConfig { alpha: Some(8.0), ..same.clone() }, &file).unwrap_err();
        assert!(e.contains("lora.alpha = 8") && e.contains("has alpha 4"), "{e}");
        let e = take(LoraConfig { target_modules: names(&["to_q", "to_k"]), ..same.clone() }, &file).unwrap_err();
        assert!(e.contains("`a.to_k`, which x.safetensors does not adapt"), "{e}");
        let e = take(LoraConfig { target_modules: names(&["a.to_q"]), ..same }, &file).unwrap_err();
        assert!(e.contains("x.safetensors adapts `b.to_q`"), "{e}");
    }
}
