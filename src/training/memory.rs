//! Memory: what is in use, counted by the allocator, and what a run will need, before it starts.
//!
//! The estimate is measured, not modelled: one differentiated denoising step and one decoded and rewarded image are
//! computed on small latents, of two sizes and two batches, and the allocator's counts are continued to the run's own.
//! All activations grow in proportion to the pixels (attention holds a tile of its scores at a time, not all), so
//!
//! ```text
//! peak of a UNet evaluation = fixed + batch · (per image + per latent pixel · h w)     twice with guidance
//! what a stored step keeps  = fixed + batch · (per image + per latent pixel · h w)     twice with guidance
//! peak of an image          = the larger of two, one image at a time, whatever the batch:
//!     with its reward       = fixed + per latent pixel · h w                       a tower's own part does not grow
//!     of the decoder alone  = fixed + per latent pixel · h w                       what its way back adds does
//! peak of the run           = what is loaded + trajectory + the largest of: a UNet evaluation;
//!                             all stored steps + an image; all stored steps + what the way back through one adds
//! ```

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use candle_core::{DType, Tensor};

use super::limits;
use crate::allocator;
use crate::config::{Checkpointing, Prompt};
use crate::diffusion::{Noise, Stream};
use crate::models::unet::UnetTrace;
use crate::models::vae::Vae;
use crate::nn::lora::LoraGradients;
use crate::ops::Ledger;
use crate::ops::device::{Compute, Counts};
use crate::rewards::Rewards;
use crate::sampling::Denoiser;

/// Whose memory a run's large blocks are in.
#[derive(Clone, Copy)]
pub enum Meter<'a> {
    /// This process' allocator.
    Host,
    Gpu(&'a Compute),
}

impl<'a> Meter<'a> {
    pub fn of(compute: &'a Compute) -> Self {
        if compute.device().is_cpu() { Self::Host } else { Self::Gpu(compute) }
    }

    fn counts(compute: &Compute) -> Result<Counts> {
        Ok(compute.gpu_memory().map(|memory| memory.counts()).transpose()?.unwrap_or_default())
    }

    /// Bytes that are allocated now.
    pub fn live(self) -> Result<usize> {
        match self {
            Self::Host => Ok(allocator::live()),
            Self::Gpu(compute) => Ok(Self::counts(compute)?.live),
        }
    }

    /// The most bytes that were allocated at a time, since the last [`Self::reset_peak`].
    pub fn peak(self) -> Result<usize> {
        match self {
            Self::Host => Ok(allocator::peak()),
            Self::Gpu(compute) => Ok(Self::counts(compute)?.peak),
        }
    }

    /// The peak is what is allocated now.
    pub fn reset_peak(self) -> Result<()> {
        match self {
            Self::Host => allocator::reset_peak(),
            Self::Gpu(compute) => {
                if let Some(memory) = compute.gpu_memory() {
                    memory.reset_peak()?;
                }
            }
        }
        Ok(())
    }

    /// Bytes that can still be had; `None` where nobody says.
    pub fn available(self) -> Option<f64> {
        match self {
            Self::Host => limits::available(),
            Self::Gpu(compute) => compute.gpu_memory()?.available().ok().map(|bytes| bytes as f64),
        }
    }

    /// The most that the process held so far, with what its allocator keeps; `None` where nobody says.
    pub fn held(self) -> Option<f64> {
        match self {
            Self::Host => resident_peak(),
            Self::Gpu(compute) => Self::counts(compute).ok().map(|counts| counts.reserved_peak as f64),
        }
    }
}

/// The parts whose memory is estimated.
pub struct Parts<'a> {
    /// Of one image or more.
    pub denoiser: Denoiser<'a>,
    pub vae: &'a Vae,
    pub rewards: &'a Rewards,
    /// What the rewards are asked about: one that says what they need to know.
    pub prompt: &'a Prompt,
    /// A timestep of the chain.
    pub timestep: f64,
    /// (channels, h, w) of one image.
    pub latent_shape: (usize, usize, usize),
    /// Steps of the chain, each of which leaves two latents in the trajectory.
    pub steps: usize,
    /// Whether images go back through the rewards and the decoder.
    pub differentiates_rewards: bool,
    /// Latents that wait until all images of a step are sampled.
    pub kept_latents: usize,
}

/// Sides of the latents that are measured: the larger one is enough for every level of the UNet.
const PROBE_SIDE: usize = 16;

impl Parts<'_> {
    /// Measures small evaluations under one kind of checkpointing.
    ///
    /// # Errors
    /// Whatever fails in them: the run would fail too.
    pub fn measure(&self, checkpointing: Checkpointing) -> Result<Costs> {
        let (_, h, w) = self.latent_shape;
        let large = (h.min(PROBE_SIDE), w.min(PROBE_SIDE));
        let small = (large.0.div_ceil(2), large.1.div_ceil(2));
        let pixels = (large.0 * large.1 - small.0 * small.1).max(1) as f64;

        // once before they count: caches fill, and threads keep buffers for their next product
        self.evaluate_once(large, checkpointing)?;
        self.image_peak(large, checkpointing)?;
        let peaks = [
            self.unet_peak(small, 1, checkpointing)?,
            self.unet_peak(small, 2, checkpointing)?,
            self.unet_peak(large, 1, checkpointing)?,
            self.image_peak(small, checkpointing)?,
            self.image_peak(large, checkpointing)?,
            self.decoder_peak(small, checkpointing)?,
            self.decoder_peak(large, checkpointing)?,
        ];
        let stored = [(small, 1), (small, 2), (large, 1)];
        let stored = stored.map(|(sides, batch)| self.stored(sides, batch, checkpointing));
        let [one, two, of_large, image, large_image, decoder, large_decoder] = peaks.map(|rise| rise.least);
        let [stored, stored_two, stored_large] = stored;
        let small = (small.0 * small.1) as f64;
        let evaluation = |[one, two, large]: [f64; 3]| {
            let (image, pixel) = (two - one, (large - one) / pixels);
            Evaluation { fixed: one - image, image: image - pixel * small, pixel }
        };
        let line = |of_small: f64, of_large: f64| {
            let pixel = (of_large - of_small) / pixels;
            Line { fixed: of_small - pixel * small, pixel }
        };
        Ok(Costs {
            loaded: self.meter().live()? as f64 + peaks.iter().map(|rise| rise.spread).fold(0.0, f64::max),
            unet: evaluation([one, two, of_large]),
            stored: evaluation([stored?, stored_two?, stored_large?]),
            image: line(image, large_image),
            decoder: line(decoder, large_decoder),
        })
    }

    fn meter(&self) -> Meter<'_> {
        Meter::of(self.denoiser.unet.compute())
    }

    fn latents(&self, (h, w): (usize, usize), batch: u64) -> Result<Tensor> {
        let noise = Noise::new(0).normal_batch(Stream::Latents, 0, 0..batch, (self.latent_shape.0, h, w))?;
        Ok(noise.to_device(self.denoiser.unet.compute().device())?)
    }

    /// One differentiated step of one image, both branches of guidance side by side.
    fn evaluate_once(&self, sides: (usize, usize), checkpointing: Checkpointing) -> Result<()> {
        let x = self.latents(sides, 1)?;
        let denoiser = Denoiser { checkpointing, ..self.denoiser.select(&Tensor::zeros(1, DType::U32, x.device())?)? };
        let mut gradients = LoraGradients::new(denoiser.adapters);
        denoiser.record(&x, self.timestep)?.pull(&x, &mut gradients).map(|_| ())
    }

    /// One branch of guidance alone: how far two overlap is another thing in every measurement.
    fn branch(&self, x: &Tensor, checkpointing: Checkpointing) -> Result<UnetTrace<'_>> {
        let Denoiser { unet, adapters, conditioning, .. } = &self.denoiser;
        let embeds = conditioning.prompt_embeds.narrow(0, 0, 1)?.repeat((x.dims()[0], 1, 1))?;
        unet.trace(x, self.timestep, &embeds, adapters, checkpointing)
    }

    fn unet_peak(&self, sides: (usize, usize), batch: u64, checkpointing: Checkpointing) -> Result<Rise> {
        let x = self.latents(sides, batch)?;
        rise(self.meter(), || {
            let mut gradients = LoraGradients::new(self.denoiser.adapters);
            self.branch(&x, checkpointing)?.pull(&x, &mut gradients)
        })
    }

    /// What one branch of a recorded step keeps.
    fn stored(&self, sides: (usize, usize), batch: u64, checkpointing: Checkpointing) -> Result<f64> {
        let x = self.latents(sides, batch)?;
        let before = self.meter().live()?;
        let trace = self.branch(&x, checkpointing)?;
        let kept = self.meter().live()?.saturating_sub(before) as f64;
        drop(trace);
        Ok(kept)
    }

    /// Branches of guidance, which are recorded before the backward pass of either begins.
    fn branches(&self) -> f64 {
        self.denoiser.conditioning.branches() as f64
    }

    fn image_peak(&self, sides: (usize, usize), checkpointing: Checkpointing) -> Result<Rise> {
        let latents = self.latents(sides, 1)?;
        let prompts = std::slice::from_ref(self.prompt);
        if !self.differentiates_rewards {
            return rise(self.meter(), || self.rewards.scores_here(&self.vae.decode(&latents)?, prompts));
        }
        rise(self.meter(), || {
            let mut ledger = Ledger::default();
            let decoded = self.vae.trace(&latents, checkpointing)?;
            let judged = self.rewards.judge_here(decoded.image(), prompts, &mut ledger)?;
            let d_latents = decoded.pull(&judged.pull(1.0)?)?;
            ledger.read()?;
            Ok(d_latents)
        })
    }

    fn decoder_peak(&self, sides: (usize, usize), checkpointing: Checkpointing) -> Result<Rise> {
        let latents = self.latents(sides, 1)?;
        if !self.differentiates_rewards {
            return rise(self.meter(), || self.vae.decode(&latents));
        }
        rise(self.meter(), || {
            let decoded = self.vae.trace(&latents, checkpointing)?;
            let cotangent = decoded.image().clone();
            decoded.pull(&cotangent)
        })
    }

    /// The peak of a run with micro-batches of `batch` images and `stored_steps` steps that are not evaluated again.
    pub fn estimate(&self, costs: &Costs, batch: usize, stored_steps: usize) -> Estimate {
        let (channels, h, w) = self.latent_shape;
        let pixels = (h * w) as f64;
        let latent = (4 * channels * h * w) as f64;
        Estimate {
            loaded: costs.loaded,
            trajectory: latent * (2 * self.steps * batch + self.kept_latents) as f64,
            unet: self.branches() * costs.unet.of(batch, pixels),
            stored_step: self.branches() * costs.stored.of(batch, pixels),
            stored_steps,
            image: costs.image.of(pixels).max(costs.decoder.of(pixels)),
        }
    }
}

/// How far the count rose above its start, in bytes.
#[derive(Clone, Copy)]
struct Rise {
    least: f64,
    /// How much more it was at most.
    spread: f64,
}

/// The rise while `work` runs.
///
/// Threads' buffers are in use together or not, as it happens, and in small models they count. There it is cheap to look
/// again with one thread: that rise is the same each time, and can be continued to other sizes.
fn rise<T>(meter: Meter, work: impl Fn() -> Result<T> + Sync) -> Result<Rise> {
    let look = || -> Result<f64> {
        let before = meter.live()?;
        meter.reset_peak()?;
        work()?;
        Ok(meter.peak()?.saturating_sub(before) as f64)
    };
    let started = Instant::now();
    let most = look()?;
    if started.elapsed() > CHEAP || !matches!(meter, Meter::Host) {
        return Ok(Rise { least: most, spread: 0.0 });
    }
    // the first time in that thread its buffers are made; it is joined, as what it gives back when it has ended would be
    // missed from the next count (the end of a scope alone does not wait for that)
    let alone = || -> Result<f64> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build()?;
        pool.install(|| look().and_then(|_| look()))
    };
    let joined = std::thread::scope(|scope| scope.spawn(alone).join());
    let least = joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(Rise { least, spread: (most - least).max(0.0) })
}

/// The longest evaluation that is done again.
const CHEAP: Duration = Duration::from_millis(100);

/// Bytes as small evaluations needed them.
pub struct Costs {
    /// With what the threads' buffers may add.
    loaded: f64,
    /// The peak of one that is differentiated, of one branch.
    unet: Evaluation,
    /// What one that is stored keeps, of one branch.
    stored: Evaluation,
    /// The peak of an image with its reward.
    image: Line,
    /// That of the decoder alone.
    decoder: Line,
}

/// Bytes that grow with the pixels.
struct Line {
    fixed: f64,
    pixel: f64,
}

impl Line {
    fn of(&self, pixels: f64) -> f64 {
        self.fixed + self.pixel * pixels
    }
}

/// Bytes of UNet evaluations, whatever their size.
struct Evaluation {
    fixed: f64,
    image: f64,
    pixel: f64,
}

impl Evaluation {
    fn of(&self, batch: usize, pixels: f64) -> f64 {
        self.fixed + batch as f64 * (self.image + self.pixel * pixels)
    }
}

/// Bytes that a run is expected to need.
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    /// Weights, adapters, moments, threads' buffers.
    pub loaded: f64,
    /// The latents and predictions of a micro-batch, and the latents of a round that is trained on when it is whole.
    pub trajectory: f64,
    /// One differentiated step of a micro-batch, both branches of guidance.
    pub unet: f64,
    /// What one stored step of a micro-batch keeps, both branches of guidance.
    pub stored_step: f64,
    pub stored_steps: usize,
    /// The decoder and the rewards, of one image, there and back.
    pub image: f64,
}

impl Estimate {
    pub fn total(&self) -> f64 {
        let stored = self.stored_steps as f64 * self.stored_step;
        let back = if self.stored_steps > 0 { self.unet - self.stored_step } else { 0.0 };
        self.loaded + self.trajectory + self.unet.max(stored + self.image.max(back))
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [loaded, unet, image] = [self.loaded, self.unet, self.image].map(size);
        write!(f, "{} (loaded {loaded}, UNet {unet}, VAE and reward {image}", size(self.total()))?;
        if self.stored_steps > 0 {
            write!(f, ", stored steps {} x {}", self.stored_steps, size(self.stored_step))?;
        }
        write!(f, ")")
    }
}

/// Bytes in GiB or MiB.
pub fn size(bytes: f64) -> String {
    let mib = bytes / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

/// The largest resident memory of this process so far in bytes, where the system tells it (Linux).
pub fn resident_peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024.0)
}

/// How a run is split so that it fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    pub checkpointing: Checkpointing,
    pub stored_steps: usize,
    pub batch_size: usize,
}

/// What a run may take, in bytes.
#[derive(Clone, Copy)]
pub struct Budget {
    pub all: f64,
    /// With stored steps, which save time and are not needed: less, where others may want memory too.
    pub storing: f64,
}

/// The first split that fits, fastest first: `step` with as many stored steps as there is room for, at most `most_stored`;
/// then `block` with the given micro-batch; then `block` with its divisors, downwards. The last one, and `false`, where
/// none fits.
pub fn fitting(batch_size: usize, most_stored: usize, budget: Budget, total: impl Fn(Split) -> f64) -> (Split, bool) {
    let step = |stored_steps| Split { checkpointing: Checkpointing::Step, stored_steps, batch_size };
    let block = |batch_size| Split { checkpointing: Checkpointing::Block, stored_steps: 0, batch_size };
    let divisors = (1..=batch_size).rev().filter(|n| batch_size.is_multiple_of(*n));
    let fits = |split: &Split| {
        let room = if split.stored_steps > 0 { budget.storing } else { budget.all };
        total(*split) <= room
    };
    match (0..=most_stored).rev().map(step).chain(divisors.map(block)).find(fits) {
        Some(split) => (split, true),
        None => (block(1), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_split_that_fits_is_chosen() {
        // an image costs 3 with `step` and 1 with `block`, 2 more for each stored step, beside 1 that is loaded
        let total = |split: Split| {
            let image = if split.checkpointing == Checkpointing::Step { 3.0 } else { 1.0 };
            1.0 + (image + 2.0 * split.stored_steps as f64) * split.batch_size as f64
        };
        let chosen = |all| {
            let (split, fits) = fitting(6, 4, Budget { all, storing: all / 2.0 }, total);
            (split.checkpointing, split.stored_steps, split.batch_size, fits)
        };
        assert_eq!(chosen(1e9), (Checkpointing::Step, 4, 6, true));
        assert_eq!(chosen(134.0), (Checkpointing::Step, 4, 6, true));
        assert_eq!(chosen(133.9), (Checkpointing::Step, 3, 6, true));
        assert_eq!(chosen(61.9), (Checkpointing::Step, 0, 6, true));
        assert_eq!(chosen(19.0), (Checkpointing::Step, 0, 6, true));
        assert_eq!(chosen(18.9), (Checkpointing::Block, 0, 6, true));
        assert_eq!(chosen(6.0), (Checkpointing::Block, 0, 3, true));
        assert_eq!(chosen(2.0), (Checkpointing::Block, 0, 1, true));
        assert_eq!(chosen(1.9), (Checkpointing::Block, 0, 1, false));
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!((size(3.0 * 1048576.0).as_str(), size(1.5 * 1073741824.0).as_str()), ("3 MiB", "1.50 GiB"));
    }
}
