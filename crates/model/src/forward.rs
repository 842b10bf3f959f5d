//! The Llama 4 forward pass of one rank over the device operations.
//!
//! ```text
//! x = embed(tokens)
//! per layer:  x += attention(rms_norm(x));  h = rms_norm(x)
//!             dense: x += mlp(h)
//!             MoE:   route = gate(h); send h * score; s = shared(h); x += s + experts' answer
//! logits = lm_head(rms_norm(rows that sample))
//! ```
//!
//! The score multiplies the expert's *input* (`Llama4TextMoe` of transformers), and the sum of shared
//! and routed output has two terms in a fixed order: that is why the number of ranks cannot show.
//! Nothing here waits for the device before [`Forward::run`] ends, and no host value depends on a
//! device result.

use crate::config::Config;
use crate::weights::{Dense, FeedForward, Mlp};
use kernels::{
    AttentionLayer, AttentionShape, Device, DeviceError, Pool, Positional, Room, RopeSpec,
    RopeTable, Sampled, StepBatch, StepLimits, StepRoom, StepShape, Temperature,
};

/// The all-to-all of a MoE layer, as the forward pass uses it: one call of each, in this order.
pub trait MoeExchange<D: Device> {
    /// Why the exchange ended a step early.
    type Error;

    /// Sends every row to the rank of its expert. `layer` counts MoE layers.
    ///
    /// # Errors
    ///
    /// The step has failed; its results are void.
    fn dispatch(
        &mut self,
        device: &mut D,
        layer: usize,
        own: (&D::Wire, &D::Route),
    ) -> Result<(), ForwardError<Self::Error>>;

    /// Waits for the rows of the local experts, runs these and sends the results back.
    ///
    /// # Errors
    ///
    /// As for `dispatch`.
    fn serve(
        &mut self,
        device: &mut D,
        experts: &D::Experts,
    ) -> Result<(), ForwardError<Self::Error>>;

    /// Waits for the results of this rank's own rows, in their order. `own` are the rows that were dispatched.
    ///
    /// # Errors
    ///
    /// As for `dispatch`.
    fn combine(
        &mut self,
        device: &mut D,
        own: &mut D::Wire,
    ) -> Result<(), ForwardError<Self::Error>>;
}

/// Why a forward pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError<E> {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("exchange: {0}")]
    Exchange(E),
}

/// What a tool wants to see of a step besides its tokens. Each item waits for the device.
pub trait Observer<D: Device> {
    /// The choice of experts in a MoE layer.
    fn routed(&mut self, moe_layer: usize, route: &D::Route);
    /// Logits of the rows that sample, `[samples, vocab]`.
    fn logits(&mut self, logits: &D::Tensor);
}

/// Sees nothing.
pub struct Unobserved;

impl<D: Device> Observer<D> for Unobserved {
    fn routed(&mut self, _: usize, _: &D::Route) {}
    fn logits(&mut self, _: &D::Tensor) {}
}

/// Buffers and tables of a rank's forward passes.
pub struct Forward<D: Device> {
    layers: Vec<AttentionLayer>,
    rope: RopeTable,
    limits: StepLimits,
    norm_eps: f32,
    x: D::Tensor,
    h: D::Tensor,
    qkv: D::Tensor,
    attended: D::Tensor,
    hidden: D::Tensor,
    dense: MlpBuffers<D>,
    shared: MlpBuffers<D>,
    router_logits: D::Tensor,
    route: D::Route,
    wire: D::Wire,
    selected: D::Tensor,
    logits: D::Tensor,
}

struct MlpBuffers<D: Device> {
    gate_up: D::Tensor,
    act: D::Tensor,
    out: D::Tensor,
}

impl<D: Device> MlpBuffers<D> {
    fn new(device: &D, rows: usize, hidden: usize, width: usize) -> Self {
        Self {
            gate_up: device.tensor(rows, 2 * width),
            act: device.tensor(rows, width),
            out: device.tensor(rows, hidden),
        }
    }

    fn run(&mut self, device: &mut D, x: &D::Tensor, mlp: &Mlp<D>) {
        device.linear(x, &mlp.gate_up, &mut self.gate_up);
        device.swiglu(&self.gate_up, &mut self.act);
        device.linear(&self.act, &mlp.down, &mut self.out);
    }
}

/// What a forward pass works on.
pub struct Pass<'a, D: Device> {
    pub dense: &'a Dense<D>,
    /// By MoE layer.
    pub experts: &'a [D::Experts],
    pub cache: &'a mut D::Cache,
    pub step: &'a StepBatch,
}

impl<D: Device> Forward<D> {
    /// Buffers for steps of up to `rows` rows, `blocks` are the capacities of (full, chunked) pool.
    ///
    /// # Panics
    ///
    /// If the vocabulary does not fit 32 bits; `Config` has checked that.
    pub fn new(device: &D, config: &Config, rows: usize, blocks: (u32, u32)) -> Self {
        let shape = shape(config);
        let tensor = |columns| device.tensor(rows, columns);
        Self {
            layers: (0..config.layers).map(|layer| attention_layer(config, layer)).collect(),
            rope: rope_table(config),
            limits: StepLimits {
                vocab: u32::try_from(config.vocab).expect("token ids have 32 bits"),
                full_blocks: blocks.0,
                chunked_blocks: blocks.1,
                chunk_tokens: config.chunk_tokens.filter(|_| config.chunked.contains(&true)),
            },
            norm_eps: config.norm_eps,
            x: tensor(config.hidden),
            h: tensor(config.hidden),
            qkv: tensor(shape.qkv()),
            attended: tensor(shape.q()),
            hidden: tensor(config.hidden),
            dense: MlpBuffers::new(device, rows, config.hidden, config.dense_width),
            shared: MlpBuffers::new(device, rows, config.hidden, config.expert_width),
            router_logits: tensor(config.experts),
            route: device.route(),
            wire: device.wire(),
            selected: device.tensor(0, config.hidden),
            logits: device.tensor(0, config.vocab),
        }
    }

    /// Takes the memory of steps of this size, so that none of them takes any.
    ///
    /// # Errors
    ///
    /// If the memory is refused.
    pub fn reserve(
        &mut self,
        device: &mut D,
        config: &Config,
        room: StepRoom,
    ) -> Result<(), DeviceError> {
        let (limits, heads, layers) = (self.limits, shape(config), pools(config));
        device.reserve(&StepShape { room, limits, heads, layers: &layers })?;
        let StepRoom { rows, samples } = room;
        let (dense, shared) = (&mut self.dense, &mut self.shared);
        for tensor in [
            &mut self.x,
            &mut self.h,
            &mut self.qkv,
            &mut self.attended,
            &mut self.hidden,
            &mut dense.gate_up,
            &mut dense.act,
            &mut dense.out,
            &mut shared.gate_up,
            &mut shared.act,
            &mut shared.out,
            &mut self.router_logits,
        ] {
            device.make_room(Room::Tensor(tensor, rows))?;
        }
        for tensor in [&mut self.selected, &mut self.logits] {
            device.make_room(Room::Tensor(tensor, samples))?;
        }
        device.make_room(Room::Route(&mut self.route, rows))?;
        device.make_room(Room::Wire(&mut self.wire, (rows, config.hidden)))
    }

    /// Logits of the last step, `[samples, vocab]`.
    #[must_use]
    pub fn logits(&self) -> &D::Tensor {
        &self.logits
    }

    /// One step. A rank without rows still serves its experts.
    ///
    /// # Errors
    ///
    /// [`ForwardError`]; the KV cache then holds positions of a step that never was, which the replay
    /// of the step overwrites.
    pub fn run<X: MoeExchange<D>>(
        &mut self,
        device: &mut D,
        pass: &mut Pass<'_, D>,
        exchange: &mut X,
        observer: &mut impl Observer<D>,
    ) -> Result<Vec<Sampled>, ForwardError<X::Error>> {
        let batch = device.upload(pass.step, &self.rope, self.limits)?;
        device.embed(&batch, &pass.dense.embed, &mut self.x);
        let mut moe_layer = 0;
        for (index, layer) in pass.dense.layers.iter().enumerate() {
            device.rms_norm(&self.x, &layer.input_norm, self.norm_eps, &mut self.h);
            device.linear(&self.h, &layer.qkv, &mut self.qkv);
            let attention = &self.layers[index];
            device.attention(&batch, attention, &mut self.qkv, pass.cache, &mut self.attended);
            device.linear(&self.attended, &layer.output, &mut self.hidden);
            let (sum, norm) = ((&mut self.x, &self.hidden), &layer.post_attention_norm);
            device.add_rms_norm(sum, norm, self.norm_eps, &mut self.h);
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => {
                    self.dense.run(device, &self.h, mlp);
                    device.add(&mut self.x, &self.dense.out);
                }
                FeedForward::Moe { router, shared } => {
                    device.linear(&self.h, router, &mut self.router_logits);
                    device.gate(&self.router_logits, &mut self.route);
                    observer.routed(moe_layer, &self.route);
                    let experts = &pass.experts[moe_layer];
                    self.moe(device, (moe_layer, shared, experts), exchange)?;
                    moe_layer += 1;
                }
            }
        }
        device.select(&batch, &self.x, &mut self.selected);
        device.rms_norm(&self.selected, &pass.dense.final_norm, self.norm_eps, &mut self.h);
        device.linear(&self.h, &pass.dense.lm_head, &mut self.logits);
        observer.logits(&self.logits);
        Ok(device.finish(&batch, pass.step, &self.logits)?)
    }

    /// Shared expert here, routed expert wherever it lives; their sum into the residual stream.
    fn moe<X: MoeExchange<D>>(
        &mut self,
        device: &mut D,
        (moe_layer, shared, experts): (usize, &Mlp<D>, &D::Experts),
        exchange: &mut X,
    ) -> Result<(), ForwardError<X::Error>> {
        device.pack(&self.h, &self.route, &mut self.wire);
        exchange.dispatch(device, moe_layer, (&self.wire, &self.route))?;
        // While the rows travel.
        self.shared.run(device, &self.h, shared);
        exchange.serve(device, experts)?;
        exchange.combine(device, &mut self.wire)?;
        device.add_wire(&self.wire, &mut self.shared.out);
        device.add(&mut self.x, &self.shared.out);
        Ok(())
    }
}

/// Heads of the model.
#[must_use]
pub fn shape(config: &Config) -> AttentionShape {
    AttentionShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
}

/// The KV pool of every layer.
#[must_use]
pub fn pools(config: &Config) -> Vec<Pool> {
    (0..config.layers).map(|layer| config.chunk(layer).map_or(Pool::Full, Pool::Chunked)).collect()
}

fn attention_layer(config: &Config, layer: usize) -> AttentionLayer {
    let position = if config.rope[layer] {
        Positional::Rope { qk_norm_eps: config.qk_norm.then_some(config.norm_eps) }
    } else {
        let temperature = config.temperature.as_ref();
        Positional::None {
            temperature: temperature
                .map(|t| Temperature { floor_scale: t.floor_scale, attn_scale: t.attn_scale }),
        }
    };
    AttentionLayer { layer, shape: shape(config), position }
}

fn rope_table(config: &Config) -> RopeTable {
    // The position within the chunk may stand for the position only if no layer with rotary
    // embedding looks across a chunk border.
    let all_chunked = (0..config.layers).all(|l| !config.rope[l] || config.chunk(l).is_some());
    let spec = RopeSpec {
        head_dim: config.head_dim,
        theta: config.rope_theta,
        scaling: config.rope_scaling.as_ref().map(|s| kernels::Llama3Scaling {
            factor: s.factor,
            low_freq_factor: s.low_freq_factor,
            high_freq_factor: s.high_freq_factor,
            original_positions: s.original_positions,
        }),
        chunk_tokens: config.chunk_tokens.filter(|_| all_chunked),
    };
    RopeTable { inv_freq: kernels::inv_freq(&spec), spec }
}
