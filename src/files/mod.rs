//! Files on disk, whatever they are for: PyTorch's files read safely, safetensors and folders written whole or not at all, and the
//! files that the program carries.

mod bundle;
mod bytes;
mod header;
mod kind;
pub mod pickle;
mod wrappers;
mod write;

pub use bundle::{Bundle, carried_in, is_carried, located};
pub use bytes::FileBytes;
pub use header::Header;
pub use kind::kind_of;
pub use wrappers::unwrapped;
pub use write::{
    SafetensorsEntry, UNFINISHED, check_writable, float_bytes, make_folder_of, new_folder, replace_file, save_tensors,
    sync_folder, write_bytes, write_safetensors,
};
