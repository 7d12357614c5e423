pub mod cli;
pub mod config;
pub mod diffusion;
pub mod lora;
pub mod models;
pub mod nn;
pub mod ops;
pub mod rewards;
