//! Align Stable Diffusion with differentiable rewards: LoRA training by backpropagation through the denoising chain.
//!
//! ```text
//! prompts -> models::{tokenizer, text_encoder} -> prompt embeddings
//!   -> training::rollout          x_T ... x_0 by DDIM with guidance, no gradient, only the latents are kept
//!   -> models::vae -> rewards     one image at a time: image, scores, loss
//!   <- training::reward_cotangent d loss / d x_0
//!   <- training::backprop         for each step of the plan, newest first: the UNet again, recorded;
//!                                 the cotangent goes back to x_t and into the LoRA factors
//!   -> optim                      clip, AdamW -> lora::Adapters -> training::checkpoint
//! ```
//!
//! Imports only go down:
//!
//! ```text
//! commands     train, eval, soup, export, sample, runs, verify, bench: recipes, read from top to bottom
//! cli          the command line
//! training     rollout, backprop, truncation (which steps keep their gradient), checkpoint, run folder
//! rewards      scores, and rewards, which have a gradient: CLIP heads, text-image cosines, preprocessing
//! diffusion    DDIM schedule, guidance, counted noise
//! models       hub, single files, weights, tokenizer, CLIP towers, UNet, VAE decoder, pipeline
//! nn           the tape, layers over frozen weights, adapters as values
//! optim        AdamW, clipping, learning-rate schedules
//! lora         factors, file formats, soups
//! config       the experiment file: plain data that any room may read
//! files        pickles read safely, files and folders written whole or not at all
//! ops          forward and backward kernels on tensors
//! allocator    where memory comes from, and how much is in use
//! ```
//!
//! The loop is `run` and `Trainer::step` in `commands/train.rs`. Contracts and decisions are in `docs/architecture.md`,
//! the backward passes in `docs/backward.md`.

pub mod allocator;
pub mod cli;
pub mod commands;
pub mod config;
pub mod diffusion;
pub mod files;
pub mod lora;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod rewards;
pub mod training;
