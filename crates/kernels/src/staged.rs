//! What the host sees of a device's buffers, where an exchange moves rows through the host's memory.
//!
//! On a CPU the buffers are the host's own. On a GPU looking at one waits for the device and copies.

use crate::cpu;
use crate::device::{Device, DeviceError};
use std::borrow::Cow;

/// Rows as they travel.
pub trait WireOnHost {
    /// The rows' bytes.
    fn bytes(&self) -> &[u8];

    /// Room for so many bytes of rows, to be overwritten whole; the next operation that takes the rows sees them.
    fn room(&mut self, bytes: usize) -> &mut [u8];
}

/// The choice of experts.
pub trait RouteOnHost {
    /// The chosen expert per row.
    fn experts(&self) -> &[u16];
}

/// Activations.
pub trait TensorOnHost {
    /// The last result, row-major.
    fn values(&self) -> Cow<'_, [f32]>;
}

/// A value that is infinite or not a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bad {
    pub place: BadPlace,
    /// Row of the place's tensor: of the step, or of the logits.
    pub row: usize,
}

/// Where such a value was seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadPlace {
    /// What goes into the experts of a MoE layer.
    Hidden {
        layer: usize,
    },
    /// What came out of them.
    Routed {
        layer: usize,
    },
    Logits,
}

/// A device whose buffers the host sees.
pub trait Staged:
    Device<Wire: WireOnHost, Route: RouteOnHost, Tensor: TensorOnHost, Arrived = [u8], Offsets = [u32]>
{
    /// Bytes of a row of `columns` elements on the wire.
    fn row_bytes(&self, columns: usize) -> usize;

    /// Whether a rank that has all experts can serve its own rows without the host: [`Staged::serve_alone`].
    const SERVES_ALONE: bool = false;

    /// Runs the experts of a MoE layer, all of which this rank has, over its own rows. The results take their place.
    fn serve_alone(
        &mut self,
        _moe_layer: usize,
        _rows: (&mut Self::Wire, &Self::Route),
        _experts: &Self::Experts,
    ) {
        unreachable!("a device that does not serve alone")
    }

    /// The first value of the step that is infinite or not a number: in its logits, and in the rows of
    /// [`Staged::serve_alone`]. Other rows the host has seen.
    ///
    /// # Errors
    ///
    /// What went wrong on the device during the step.
    fn bad_value(&mut self, logits: &Self::Tensor) -> Result<Option<Bad>, DeviceError>;
}

impl WireOnHost for cpu::Wire {
    fn bytes(&self) -> &[u8] {
        Self::bytes(self)
    }

    fn room(&mut self, bytes: usize) -> &mut [u8] {
        Self::room(self, bytes)
    }
}

impl RouteOnHost for cpu::Route {
    fn experts(&self) -> &[u16] {
        Self::experts(self)
    }
}

impl TensorOnHost for cpu::Tensor {
    fn values(&self) -> Cow<'_, [f32]> {
        Cow::Borrowed(self.data())
    }
}

impl Staged for cpu::Cpu {
    fn row_bytes(&self, columns: usize) -> usize {
        Self::row_bytes(self, columns)
    }

    fn bad_value(&mut self, logits: &cpu::Tensor) -> Result<Option<Bad>, DeviceError> {
        let columns = logits.data().len().checked_div(logits.rows()).unwrap_or(0);
        let is_bad = |row: &[f32]| row.iter().fold(false, |any, value| any | !value.is_finite());
        let row = logits.data().chunks_exact(columns.max(1)).position(is_bad);
        Ok(row.map(|row| Bad { place: BadPlace::Logits, row }))
    }
}
