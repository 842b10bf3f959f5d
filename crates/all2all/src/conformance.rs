//! The rules of an exchange as tests that every transport must pass.
//!
//! A transport says how a rank joins ([`Network`]); its test file lists the checks with
//! [`conformance!`](crate::conformance!). Ranks are threads here, each with its own end, whatever lies
//! between the ends. A check panics with what it saw and, where chance is involved, the seed.
//!
//! Contents are verified when a step is complete, for only then they mean anything: every arrived row
//! and every result is recomputed from (epoch, step, layer, source, row) by a few lines that know nothing of
//! parcels ([`scene`]).

#![allow(clippy::missing_panics_doc, reason = "a check panics where a transport breaks a rule")]

mod aborts;
mod epochs;
mod faults;
mod flow;
mod masked;
mod rig;
mod rng;
mod scene;

pub use aborts::{
    check_abort_ends_its_epoch_wherever_it_falls, check_abort_of_an_old_epoch_is_void,
    check_aborter_outlives_its_view, check_aborts_may_race_with_everything,
};
pub use epochs::{
    check_epochs_only_rise, check_rows_of_an_old_epoch_never_show,
    check_slow_rank_joins_a_step_that_waits_for_it,
};
pub use faults::{
    check_gone_peer_ends_the_step_at_once, check_left_step_has_failed,
    check_poison_lasts_until_the_next_view, check_silent_peer_ends_the_step_at_the_deadline,
    check_step_is_all_or_nothing,
};
pub use flow::{
    check_every_row_comes_back_once, check_hot_path_allocates_nothing,
    check_many_steps_under_random_delays, check_rows_keep_every_bit, check_rows_may_be_shared_anew,
};
pub use masked::{check_masked_rank_is_never_read, check_routes_to_a_masked_rank_are_refused};

use crate::{AllToAll, ExchangeError, HostRows, View};
use std::time::Duration;

/// An exchange whose rows lie in host memory.
pub trait HostExchange:
    for<'r> AllToAll<
        Rows<'r> = HostRows<'r>,
        RowsMut<'r> = &'r mut [u8],
        Experts<'r> = &'r [u16],
        Offsets = [u32],
    >
{
}

impl<T> HostExchange for T where
    T: for<'r> AllToAll<
            Rows<'r> = HostRows<'r>,
            RowsMut<'r> = &'r mut [u8],
            Experts<'r> = &'r [u16],
            Offsets = [u32],
        >
{
}

/// A place where the ranks of one cluster find each other; a check makes as many as it needs.
pub trait Network: Send + Sync + 'static {
    type End: HostExchange + 'static;

    /// How long after the deadline, or after a peer is known to be gone, a call may still take. Generous:
    /// a test machine runs more threads than it has cores.
    fn grace(&self) -> Duration;

    /// Makes the end of rank `view.me`. The ranks of a view join at the same time, each in its thread;
    /// dropping an end is how a rank dies.
    ///
    /// # Errors
    ///
    /// As [`AllToAll::reconfigure`].
    fn join(&self, view: View) -> Result<Self::End, ExchangeError>;
}

/// Makes one test of every check, so that no transport leaves one out.
///
/// * `$network`: an expression that makes a new [`Network`]
/// * `$allocations`: a `fn() -> u64` that counts the allocations of the calling thread so far; left out
///   where rows lie on a device, which the host cannot reach without
#[macro_export]
macro_rules! conformance {
    ($network:expr, $allocations:expr) => {
        $crate::conformance!($network);

        #[test]
        fn check_hot_path_allocates_nothing() {
            $crate::conformance::check_hot_path_allocates_nothing(&|| $network, $allocations);
        }
    };
    ($network:expr) => {
        $crate::conformance!(@tests $network;
            check_abort_ends_its_epoch_wherever_it_falls
            check_abort_of_an_old_epoch_is_void
            check_aborter_outlives_its_view
            check_aborts_may_race_with_everything
            check_epochs_only_rise
            check_every_row_comes_back_once
            check_gone_peer_ends_the_step_at_once
            check_left_step_has_failed
            check_many_steps_under_random_delays
            check_masked_rank_is_never_read
            check_poison_lasts_until_the_next_view
            check_routes_to_a_masked_rank_are_refused
            check_rows_keep_every_bit
            check_rows_may_be_shared_anew
            check_rows_of_an_old_epoch_never_show
            check_silent_peer_ends_the_step_at_the_deadline
            check_slow_rank_joins_a_step_that_waits_for_it
            check_step_is_all_or_nothing
        );
    };
    (@tests $network:expr; $($check:ident)*) => {
        $(
            #[test]
            fn $check() {
                $crate::conformance::$check(&|| $network);
            }
        )*
    };
}
