//! The forward pass's exchange where ranks lend each other rows on the device that they share: nothing passes through the
//! host, and no call waits for the device, which watches the values and counts the rows itself.

use crate::chaos::Struck;
use all2all::local::Lending;
use all2all::{AllToAll, ExchangeError, LayerKey, Pending, Sent};
use ids::StepId;
use kernels::Staged;
use model::forward::{ForwardError, MoeExchange};

/// Where a layer stands.
enum Stage {
    Idle,
    Sent(Sent),
    Pending(Pending),
}

/// One step's use of such an exchange.
pub(crate) struct StepLoans<'a, 's, D: Staged> {
    exchange: &'a mut Struck<'s, Lending<D::Lent>>,
    routes: &'a D::Routes,
    step: StepId,
    layer: u16,
    stage: Stage,
}

impl<'a, 's, D: Staged> StepLoans<'a, 's, D> {
    pub(crate) fn new(
        exchange: &'a mut Struck<'s, Lending<D::Lent>>,
        step: StepId,
        routes: &'a D::Routes,
    ) -> Self {
        Self { exchange, routes, step, layer: 0, stage: Stage::Idle }
    }
}

impl<D: Staged> MoeExchange<D> for StepLoans<'_, '_, D> {
    type Error = ExchangeError;

    fn dispatch(
        &mut self,
        device: &mut D,
        layer: usize,
        own: (&D::Wire, &D::Route),
    ) -> Result<(), ForwardError<ExchangeError>> {
        self.layer = u16::try_from(layer).expect("layers are numbered in 16 bits");
        let key = LayerKey { step: self.step, layer: self.layer };
        let loan = Some(device.lend(layer, own, self.routes));
        let sent = self.exchange.dispatch_send(key, &[loan], ());
        self.stage = Stage::Sent(sent.map_err(ForwardError::Exchange)?);
        Ok(())
    }

    fn serve(
        &mut self,
        device: &mut D,
        experts: &D::Experts,
    ) -> Result<(), ForwardError<ExchangeError>> {
        let sent = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Sent(sent) => sent,
            Stage::Idle | Stage::Pending(_) => {
                unreachable!("the forward pass dispatches before it serves")
            }
        };
        let arrived = self.exchange.dispatch_recv(sent).map_err(ForwardError::Exchange)?;
        let here = (usize::from(self.layer), self.exchange.view().me.0);
        device.serve(here, self.exchange.arrived(&arrived).0, experts);
        let pending = self.exchange.combine_send(arrived, &[]);
        self.stage = Stage::Pending(pending.map_err(ForwardError::Exchange)?);
        Ok(())
    }

    fn combine(
        &mut self,
        device: &mut D,
        own: &mut D::Wire,
    ) -> Result<(), ForwardError<ExchangeError>> {
        let pending = match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Pending(pending) => pending,
            Stage::Idle | Stage::Sent(_) => {
                unreachable!("the forward pass serves before it combines")
            }
        };
        self.exchange.combine_recv(pending, ()).map_err(ForwardError::Exchange)?;
        device.regain(usize::from(self.layer), own);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
