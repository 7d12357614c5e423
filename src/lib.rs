//! Align Stable Diffusion with differentiable rewards: LoRA training by backpropagation through the denoising chain.
//!
//! ```text
//! prompts -> models::{tokenizer, text_encoder} -> prompt embeddings
//!   -> training::step::sample         x_T ... x_0 by DDIM with guidance, no gradient, only the latents are kept
//!   -> training::step::credit         one image at a time: decoded, scored (judge), and d loss / d x_0
//!   -> training::step::differentiate  for each step of the plan, newest first: the UNet again, recorded;
//!                                     the cotangent goes back to x_t and into the LoRA factors
//!   -> training::step::update         clip, AdamW -> lora::Adapters -> training::checkpoint
//! ```
//!
//! Imports only go down:
//!
//! ```text
//! commands     train, eval, soup, export, sample, config, runs, verify, bench, ..: recipes, read from top to bottom
//! cli          the command line
//! training     the optimizer step, AlignProp, DDPO and GRPO, the run's loop and plan, truncation, checkpoint, run folder
//! report       metrics, the best of them, charts, a run's page, pictures, TensorBoard's event files
//! sampling     the UNet with adapters and prompts, the denoising chain, images of prompts
//! rewards      scores and differentiable rewards, CLIP heads, text-image cosines, preprocessing
//! pictures     pictures that exist: files and lists of them, their prompts, their pixels
//! fit          linear heads from people's opinions of pictures
//! diffusion    DDIM schedule, guidance, counted noise
//! models       hub, single files, weights, tokenizer, CLIP towers, UNet, VAE decoder, pipeline
//! nn           the tape, layers over frozen weights, adapters as values
//! optim        AdamW, clipping, learning-rate schedules
//! lora         factors, file formats, soups
//! config       the experiment file: plain data that any room may read
//! files        pickles read safely, files and folders written whole or not at all
//! ops          forward and backward kernels on tensors
//! allocator    where memory comes from, and how much is in use
//! terminal     the one door to stdout and stderr
//! ```
//!
//! The loop is `Trainer::train` in `training/trainer.rs`, its step `training/alignprop.rs` or `training/ddpo.rs`. Contracts and decisions are in `docs/architecture.md`,
//! the backward passes in `docs/backward.md`.

// a closed pipe must not end a training: see `terminal`
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[macro_use]
pub mod terminal;

pub mod allocator;
pub mod cli;
pub mod commands;
pub mod config;
pub mod diffusion;
pub mod files;
pub mod fit;
pub mod lora;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod pictures;
pub mod report;
pub mod rewards;
pub mod sampling;
pub mod training;
