//! What the host sees of a device's buffers, where an exchange moves rows through the host's memory.
//!
//! On a CPU the buffers are the host's own. On a GPU looking at one waits for the device and copies.

use crate::cpu;
use crate::device::Device;
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

/// Rows in device memory and the experts that they want. It counts as long as the wire and the route that it was made
/// of are not overwritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LocalRows {
    pub(crate) rows: u64,
    pub(crate) experts: u64,
    pub(crate) count: u32,
}

/// A device whose buffers the host sees.
pub trait Staged:
    Device<Wire: WireOnHost, Route: RouteOnHost, Tensor: TensorOnHost, Arrived = [u8], Offsets = [u32]>
{
    /// Bytes of a row of `columns` elements on the wire.
    fn row_bytes(&self, columns: usize) -> usize;

    /// Rows that wait for experts of their own rank, if the device can serve them without the host.
    fn local_rows(_wire: &Self::Wire, _route: &Self::Route) -> Option<LocalRows> {
        None
    }

    /// Runs the experts of a rank that has them all over rows that wait; the results take their place.
    fn serve_local(&mut self, _rows: LocalRows, _experts: &Self::Experts) {
        unreachable!("a device without local rows")
    }

    /// The first of the rows with a value that is infinite or not a number.
    fn first_bad_row(&mut self, x: &Self::Tensor) -> Option<usize>;
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

    fn first_bad_row(&mut self, x: &cpu::Tensor) -> Option<usize> {
        let columns = x.data().len().checked_div(x.rows())?;
        let is_bad = |row: &[f32]| row.iter().fold(false, |any, value| any | !value.is_finite());
        x.data().chunks_exact(columns.max(1)).position(is_bad)
    }
}
