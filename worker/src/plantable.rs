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

    /// What peers have spoilt of this rank's results is so from now on. They have come.
    fn spoil_results(&mut self) {}

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

    /// Of the first rank that has rows, which spoils its result itself: when it has it, nobody writes there any more.
    fn combine_send_spoilt(
        &mut self,
        arrived: Arrived,
        results: &[Option<L>],
        _dtype: Dtype,
    ) -> Result<Pending, ExchangeError> {
        assert!(results.is_empty(), "results of loans have no names");
        let lent = self.arrived(&arrived).0;
        let has_rows = |loan: &Option<L>| loan.as_ref().is_some_and(|loan| 0 < loan.rows());
        let mut named = vec![None; lent.len()];
        if let Some(first) = lent.iter().position(has_rows) {
            named[first].clone_from(&lent[first]);
        }
        self.combine_send(arrived, &named)
    }

    fn spoil_results(&mut self) {
        self.named().for_each(|loan| loan.spoil());
    }
}
