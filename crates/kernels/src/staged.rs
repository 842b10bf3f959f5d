//! How rows of a device get to other ranks: through the host's memory, or, where several ranks share a device, not at all.
//!
//! On a CPU the buffers are the host's own. On a GPU looking at one waits for the device and copies.

use crate::cpu;
use crate::device::{Device, DeviceError};
use std::borrow::Cow;
use std::convert::Infallible;

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

/// Rows that stay where they are, lent to the other ranks on the device. Results take their place.
pub trait Loan: Clone + Send + 'static {
    /// Number of rows.
    fn rows(&self) -> usize;

    /// Makes a value of the first row no number.
    fn spoil(&self);
}

/// What a device has noted of a step that is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Noted<'a> {
    /// The first value that is infinite or not a number: in the logits, and in rows that were lent. Other rows the host
    /// has seen.
    pub bad: Option<Bad>,
    /// Rows per expert that were served where they are, `[moe layers][experts of the model]`, the local experts first.
    /// Means something only if all layers' were.
    pub served: &'a [u32],
}

/// A device whose buffers the host sees.
pub trait Staged:
    Device<Wire: WireOnHost, Route: RouteOnHost, Tensor: TensorOnHost, Arrived = [u8], Offsets = [u32]>
{
    /// How many ranks on the same device can lend each other rows ([`Staged::lend`]); 0 if none can.
    const LENDERS_MAX: u16;

    /// Rows of a rank that others may use.
    type Lent: Loan;

    /// Who serves a rank's rows, in all MoE layers.
    type Routes: Send;

    /// Bytes of a row of `columns` elements on the wire.
    fn row_bytes(&self, columns: usize) -> usize;

    /// What went wrong on the device so far, as far as anybody knows. What the host is shown after that means nothing, not
    /// even its length.
    ///
    /// # Errors
    ///
    /// That.
    fn failed(&self) -> Result<(), DeviceError>;

    /// Lends rows for a MoE layer. Whatever the device does to them next must wait until all to whom they were lent are
    /// through with [`Staged::serve`], or it happens elsewhere in its memory.
    fn lend(
        &mut self,
        moe_layer: usize,
        rows: (&Self::Wire, &Self::Route),
        routes: &Self::Routes,
    ) -> Self::Lent;

    /// Runs the local experts over their rows of all that was lent, `[ranks]`. The results take their place.
    ///
    /// * `here`: the MoE layer, and this rank
    fn serve(&mut self, here: (usize, u16), lent: &[Option<Self::Lent>], experts: &Self::Experts);

    /// All have served the rows that were lent last: they are results now.
    fn regain(&mut self, moe_layer: usize, rows: &mut Self::Wire);

    /// What it has noted of the step.
    ///
    /// # Errors
    ///
    /// What went wrong on the device during the step.
    fn noted(&mut self, logits: &Self::Tensor) -> Result<Noted<'_>, DeviceError>;
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

impl Loan for Infallible {
    fn rows(&self) -> usize {
        match *self {}
    }

    fn spoil(&self) {
        match *self {}
    }
}

impl Staged for cpu::Cpu {
    const LENDERS_MAX: u16 = 0;
    type Lent = Infallible;
    type Routes = ();

    fn row_bytes(&self, columns: usize) -> usize {
        Self::row_bytes(self, columns)
    }

    fn failed(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn lend(&mut self, _: usize, _: (&cpu::Wire, &cpu::Route), (): &()) -> Infallible {
        unreachable!("a CPU does not lend")
    }

    fn serve(&mut self, _: (usize, u16), _: &[Option<Infallible>], _: &cpu::Experts) {
        unreachable!("a CPU does not lend")
    }

    fn regain(&mut self, _: usize, _: &mut cpu::Wire) {
        unreachable!("a CPU does not lend")
    }

    fn noted(&mut self, logits: &cpu::Tensor) -> Result<Noted<'_>, DeviceError> {
        let columns = logits.data().len().checked_div(logits.rows()).unwrap_or(0);
        let is_bad = |row: &[f32]| row.iter().fold(false, |any, value| any | !value.is_finite());
        let row = logits.data().chunks_exact(columns.max(1)).position(is_bad);
        let bad = row.map(|row| Bad { place: BadPlace::Logits, row });
        Ok(Noted { bad, served: &[] })
    }
}
