//! What a tool sees of a step besides its tokens.

use kernels::{RouteOnHost, Staged, TensorOnHost};

/// Looks at a step. On a GPU every look waits for the device.
pub trait Observer {
    /// The choice of experts in a MoE layer, `[rows]`.
    fn routed(&mut self, moe_layer: usize, experts: &[u16]);
    /// Logits of the rows that sample, `[samples, vocab]`.
    fn logits(&mut self, logits: &[f32]);
}

/// Passes on what the forward pass shows, if anybody looks.
pub(crate) struct Eyes<'a> {
    pub(crate) observer: Option<&'a mut dyn Observer>,
}

impl<D: Staged> model::forward::Observer<D> for Eyes<'_> {
    fn routed(&mut self, moe_layer: usize, route: &D::Route) {
        if let Some(observer) = &mut self.observer {
            observer.routed(moe_layer, route.experts());
        }
    }

    fn logits(&mut self, logits: &D::Tensor) {
        if let Some(observer) = &mut self.observer {
            observer.logits(&logits.values());
        }
    }
}
