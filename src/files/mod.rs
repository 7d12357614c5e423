//! Files on disk, whatever they are for: PyTorch pickles read safely, safetensors and folders written whole or not at all.

mod bytes;
pub mod pickle;
mod write;

pub use bytes::FileBytes;
pub use write::{
    SafetensorsEntry, UNFINISHED, float_bytes, new_folder, replace_file, save_tensors, sync_folder, write_bytes,
    write_safetensors,
};
