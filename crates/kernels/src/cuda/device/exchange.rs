//! A GPU's part in the exchange of a step, and what is noted of the step.

use super::Cuda;
use crate::cuda::dispatch::{RouteTable, SOURCES_MAX};
use crate::cuda::driver::CudaError;
use crate::cuda::lent::LentRows;
use crate::cuda::routed::{ExpertsOnDevice, Here};
use crate::cuda::tensor::Tensor;
use crate::cuda::travel::{RouteOnDevice, WireOnDevice};
use crate::device::DeviceError;
use crate::staged::{Bad, BadPlace, Noted, Staged};
use std::sync::Arc;

/// Flags of [`Notes`].
const LOGITS: usize = 0;

/// How many there are: the last is of rows that nobody serves.
pub(super) fn flags(moe_layers: usize) -> usize {
    flag_of_hidden(moe_layers) + 1
}

fn flag_of_hidden(moe_layer: usize) -> usize {
    1 + 2 * moe_layer
}

fn flag_of_routed(moe_layer: usize) -> usize {
    2 + 2 * moe_layer
}

fn place_of(flag: usize) -> BadPlace {
    let layer = flag.saturating_sub(1) / 2;
    match flag {
        LOGITS => BadPlace::Logits,
        _ if flag == flag_of_hidden(layer) => BadPlace::Hidden { layer },
        _ => BadPlace::Routed { layer },
    }
}

impl Staged for Cuda {
    const LENDERS_MAX: u16 = SOURCES_MAX;
    type Lent = LentRows;
    type Routes = Arc<RouteTable>;

    fn row_bytes(&self, columns: usize) -> usize {
        columns * self.dtype.bytes()
    }

    fn failed(&self) -> Result<(), DeviceError> {
        self.failure()
    }

    fn lend(
        &mut self,
        moe_layer: usize,
        (wire, route): (&WireOnDevice, &RouteOnDevice),
        routes: &Arc<RouteTable>,
    ) -> LentRows {
        self.attempt(|this| this.notes.look(&this.driver, &wire.tensor, flag_of_hidden(moe_layer)));
        match self.first_error() {
            None => LentRows::new(&wire.tensor, &route.route, routes),
            // What was not made is not there.
            Some(_) => LentRows::none(&wire.tensor, &route.route, routes),
        }
    }

    fn serve(
        &mut self,
        (moe_layer, me): (usize, u16),
        lent: &[Option<LentRows>],
        experts: &ExpertsOnDevice,
    ) {
        let Some(dtype) = experts.dtype() else { return };
        let shape = (dtype, experts.hidden());
        let source = |loan: &Option<LentRows>| {
            loan.as_ref().map(|loan| loan.source(moe_layer, shape)).unwrap_or_default()
        };
        self.attempt(|this| {
            let here = Here {
                layer: moe_layer,
                me,
                served: this.notes.numbers_at(moe_layer * this.experts, experts.slots()),
                unserved: this.notes.last_flag(),
            };
            this.routed.serve(lent.iter().map(source), here, experts)
        });
    }

    fn regain(&mut self, moe_layer: usize, wire: &mut WireOnDevice) {
        let rows = wire.in_place();
        self.attempt(|this| this.notes.look(&this.driver, rows, flag_of_routed(moe_layer)));
    }

    fn noted(&mut self, logits: &Tensor) -> Result<Noted<'_>, DeviceError> {
        self.attempt(|this| this.notes.look(&this.driver, logits, LOGITS));
        self.failure()?;
        match self.notes.read() {
            Ok((mut flags, served)) => {
                if let Some(row) = flags.next_back().flatten() {
                    return Err(DeviceError::Cuda(CudaError::Unserved { row }));
                }
                // What was seen first in the step is what went wrong.
                let bad = |(flag, row): (usize, Option<u32>)| {
                    Some(Bad { place: place_of(flag), row: row? as usize })
                };
                let mut flags = flags.enumerate();
                let in_logits = flags.next().and_then(bad);
                Ok(Noted { bad: flags.find_map(bad).or(in_logits), served })
            }
            Err(error) => {
                self.driver.fail(error.clone());
                Err(DeviceError::Cuda(error))
            }
        }
    }
}
