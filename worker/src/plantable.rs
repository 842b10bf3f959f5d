//! What armed faults do to an exchange and to what it carries.

use all2all::local::{Lending, Local};
use all2all::tcp::Tcp;
use all2all::{AllToAll, Arrived, ExchangeError, HostRows, Pending};
use kernels::{Dtype, Loan};

/// An exchange that can spoil a frame, or a result.
pub(crate) trait Plantable: AllToAll {
    /// The next frame with rows for another rank arrives changed. Only where the transport
    /// [sums](crate::joined::Transport::sums).
    fn corrupt_next_frame(&mut self) {}

    /// Not so after all; false if it has been sent.
    fn keep_next_frame(&mut self) -> bool {
        false
    }

    /// How many rows these are.
    fn count(rows: &Self::Rows<'_>) -> usize;

    /// As [`AllToAll::combine_send`], for results one of which is not a number.
    fn combine_send_spoilt(
        &mut self,
        arrived: Arrived,
        results: Self::Rows<'_>,
        dtype: Dtype,
    ) -> Result<Pending, ExchangeError>;
}

/// Rows in host memory, the first value of which is not a number.
fn spoilt(results: HostRows<'_>, dtype: Dtype) -> Vec<u8> {
    let mut bytes = results.bytes.to_vec();
    match dtype {
        Dtype::F32 => bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
        Dtype::Bf16 => bytes[..2].copy_from_slice(&half::bf16::NAN.to_le_bytes()),
    }
    bytes
}

impl Plantable for Local {
    fn count(rows: &HostRows<'_>) -> usize {
        rows.len()
    }

    fn combine_send_spoilt(
        &mut self,
        arrived: Arrived,
        results: HostRows<'_>,
        dtype: Dtype,
    ) -> Result<Pending, ExchangeError> {
        self.combine_send(arrived, HostRows { bytes: &spoilt(results, dtype), ..results })
    }
}

impl Plantable for Tcp {
    fn corrupt_next_frame(&mut self) {
        Self::corrupt_next_frame(self);
    }

    fn keep_next_frame(&mut self) -> bool {
        Self::keep_next_frame(self)
    }

    fn count(rows: &HostRows<'_>) -> usize {
        rows.len()
    }

    fn combine_send_spoilt(
        &mut self,
        arrived: Arrived,
        results: HostRows<'_>,
        dtype: Dtype,
    ) -> Result<Pending, ExchangeError> {
        self.combine_send(arrived, HostRows { bytes: &spoilt(results, dtype), ..results })
    }
}

impl<L: Loan> Plantable for Lending<L> {
    /// Those of all ranks: how many of them are this rank's, only the device knows.
    fn count(rows: &&[Option<L>]) -> usize {
        rows.iter().flatten().map(Loan::rows).sum()
    }

    /// Whoever serves the row that is spoilt: if it was served already, the result is not a number, and if it will be,
    /// nothing else can come of it.
    fn combine_send_spoilt(
        &mut self,
        arrived: Arrived,
        results: &[Option<L>],
        _dtype: Dtype,
    ) -> Result<Pending, ExchangeError> {
        let lent = self.arrived(&arrived).0;
        if let Some(loan) = lent.iter().flatten().find(|loan| 0 < loan.rows()) {
            loan.spoil();
        }
        self.combine_send(arrived, results)
    }
}
