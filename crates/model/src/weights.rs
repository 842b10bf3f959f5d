//! The dense weights of a rank in a device's form: everything but the routed experts. Ranks that are threads of one process
//! share them.

use kernels::Device;

/// Everything but the routed experts.
pub struct Dense<D: Device> {
    pub embed: D::Embedding,
    pub layers: Vec<Layer<D>>,
    pub final_norm: D::Norm,
    pub lm_head: D::Matrix,
}

/// One decoder layer.
pub struct Layer<D: Device> {
    pub input_norm: D::Norm,
    /// `[q | k | v, hidden]`
    pub qkv: D::Matrix,
    /// `[hidden, q]`
    pub output: D::Matrix,
    pub post_attention_norm: D::Norm,
    pub feed_forward: FeedForward<D>,
}

/// A gated MLP: `down(silu(gate x) * up x)`.
pub struct Mlp<D: Device> {
    /// `[gate | up, hidden]`
    pub gate_up: D::Matrix,
    /// `[hidden, width]`
    pub down: D::Matrix,
}

/// What follows attention.
pub enum FeedForward<D: Device> {
    Dense(Mlp<D>),
    Moe {
        /// `[experts, hidden]`
        router: D::Matrix,
        shared: Mlp<D>,
    },
}
