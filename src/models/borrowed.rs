//! Models of candle-transformers on our weights: they run forward only and on the CPU, for judges that no gradient goes through.

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::Weights;

/// Named tensors as candle-nn's layers ask for them, in f32 on the CPU.
pub fn var_builder(weights: &Weights) -> VarBuilder<'static> {
    VarBuilder::from_backend(Box::new(Backend(weights.clone())), DType::F32, Device::Cpu)
}

struct Backend(Weights);

impl Backend {
    /// The name in the file, which may be of the time when PyTorch's BERT called its norms' weights as TensorFlow does. A head that
    /// shares the weights of the embeddings is not in it.
    fn name(&self, name: &str) -> String {
        let others = [
            ("LayerNorm.weight", "LayerNorm.gamma"),
            ("LayerNorm.bias", "LayerNorm.beta"),
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ];
        let other = others.iter().find_map(|(asked, other)| Some(format!("{}{other}", name.strip_suffix(asked)?)));
        other.filter(|other| !self.0.contains(name) && self.0.contains(other)).unwrap_or_else(|| name.to_owned())
    }
}

impl SimpleBackend for Backend {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let found = self.0.get(&self.name(name), shape.dims()).map_err(|error| Error::Msg(format!("{error:#}")))?;
        found.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let found = self.0.get_any(&self.name(name)).map_err(|error| Error::Msg(format!("{error:#}")))?;
        found.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains(&self.name(name))
    }
}
