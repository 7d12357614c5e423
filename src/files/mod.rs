//! Files on disk, whatever they are for: PyTorch pickles read safely, safetensors and folders written whole or not at all.

pub mod pickle;
mod write;

pub use write::{
    SafetensorsEntry, UNFINISHED, check_writable, float_bytes, make_folder_of, new_folder, replace_file, save_tensors,
    sync_folder, write_bytes, write_safetensors,
};
