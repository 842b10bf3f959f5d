//! The store on etcd, over its v3 gRPC API.
//!
//! Every unary call goes to one endpoint and, if that does not answer, to the next: each is a read, or
//! a write that can be carried out twice without harm. A watch is opened again after every break,
//! from the state that stands then.

mod endpoint;

mod pb {
    #![allow(clippy::all, clippy::pedantic, clippy::restriction, reason = "generated")]
    #![allow(unreachable_pub, reason = "generated")]
    tonic::include_proto!("etcdserverpb");
}

pub use endpoint::{EtcdConfig, EtcdTls};

use crate::{
    BoxFuture, BoxStream, Entry, Guard, LeaseId, Revision, Store, StoreError, Swap,
    VALUE_BYTES_MAX, Write,
};
use endpoint::Member;
use futures::StreamExt;
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::request_op::Request as Op;
use pb::response_op::Response as Done;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Longest wait for one answer of one endpoint.
const CALL_MAX: Duration = Duration::from_secs(2);
/// Rounds over all endpoints before a call counts as unanswered.
const ROUNDS: usize = 2;
/// Between attempts to open a watch.
const WATCH_RETRY: Duration = Duration::from_millis(200);
/// An etcd cluster.
#[derive(Clone)]
pub struct Etcd {
    shared: Arc<Shared>,
}

struct Shared {
    members: Vec<Member>,
    /// The endpoint that answered last.
    current: AtomicUsize,
    user: Option<(String, String)>,
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl Etcd {
    /// Connects when it is first used.
    ///
    /// # Errors
    ///
    /// [`StoreError::Refused`] if an address is no URL, or a certificate cannot be read.
    pub fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let member = |url| Member::new(url, config.tls.as_ref());
        let members = config.urls.split(',').map(member).collect::<Result<_, StoreError>>()?;
        Ok(Self {
            shared: Arc::new(Shared {
                members,
                current: AtomicUsize::new(0),
                user: config.user.clone(),
                token: Mutex::new(None),
            }),
        })
    }

    /// One transaction.
    async fn txn(&self, txn: pb::TxnRequest) -> Result<pb::TxnResponse, StoreError> {
        let call = |channel, request| async move {
            pb::kv_client::KvClient::new(channel)
                .txn(request)
                .await
                .map(tonic::Response::into_inner)
        };
        self.shared.call(txn, call).await
    }

    async fn swap_now(&self, write: Write) -> Result<Swap, StoreError> {
        if VALUE_BYTES_MAX < write.value.len() {
            return Err(StoreError::TooLarge { key: write.key, bytes: write.value.len() });
        }
        let key = write.key.clone().into_bytes();
        let put = pb::PutRequest {
            key: key.clone(),
            value: write.value,
            lease: write.lease.map_or(0, |lease| lease.0),
        };
        let mut compare = vec![modified(&write.key, write.expected)];
        let mut failure = vec![op(Op::RequestRange(range(&write.key)))];
        if let Some(guard) = &write.guard {
            compare.push(created(guard));
            failure.push(op(Op::RequestRange(range(&guard.key))));
        }
        let txn = pb::TxnRequest { compare, success: vec![op(Op::RequestPut(put))], failure };
        let answer = self.txn(txn).await?;
        if answer.succeeded {
            return Ok(Swap::Done(header_revision(answer.header)));
        }
        let mut found = answer.responses.into_iter().map(first);
        let stands = found.next().flatten();
        let fence = found.next().flatten().map(|entry| entry.created);
        match write.guard {
            Some(guard) if fence != Some(guard.created) => Ok(Swap::Fenced),
            Some(_) | None => Ok(Swap::Lost(stands)),
        }
    }

    async fn get_now(&self, key: &str) -> Result<(Option<Entry>, Revision), StoreError> {
        let call = |channel, request| async move {
            pb::kv_client::KvClient::new(channel)
                .range(request)
                .await
                .map(tonic::Response::into_inner)
        };
        let answer = self.shared.call(range(key), call).await?;
        let entry = answer.kvs.into_iter().next().map(entry);
        Ok((entry, header_revision(answer.header)))
    }

    async fn keep_alive_now(&self, lease: LeaseId) -> Result<(), StoreError> {
        let request = pb::LeaseKeepAliveRequest { id: lease.0 };
        let call = |channel, request: Request<pb::LeaseKeepAliveRequest>| async move {
            let mut client = pb::lease_client::LeaseClient::new(channel);
            let (metadata, extensions, message) = request.into_parts();
            let stream = futures::stream::iter([message]);
            let request = Request::from_parts(metadata, extensions, stream);
            let mut answers = client.lease_keep_alive(request).await?.into_inner();
            let answer = answers.message().await?;
            answer.ok_or_else(|| Status::unavailable("the stream ended without an answer"))
        };
        let answer = self.shared.call(request, call).await?;
        if answer.ttl <= 0 { Err(StoreError::LeaseGone) } else { Ok(()) }
    }

    /// What stands under the key, and the events after it; broken off at any time.
    async fn follow(&self, key: &str) -> Result<Follow, StoreError> {
        let (entry, revision) = self.get_now(key).await?;
        let next = i64::try_from(revision.0).unwrap_or(i64::MAX - 1) + 1;
        let create = pb::WatchCreateRequest {
            key: key.as_bytes().to_vec(),
            range_end: Vec::new(),
            start_revision: next,
        };
        let union = pb::watch_request::RequestUnion::CreateRequest(create);
        let request = pb::WatchRequest { request_union: Some(union) };
        let call = |channel, request: Request<pb::WatchRequest>| async move {
            let mut client = pb::watch_client::WatchClient::new(channel);
            let (metadata, extensions, message) = request.into_parts();
            // The stream must stay open as long as the watch is wanted.
            let stream = futures::stream::iter([message]).chain(futures::stream::pending());
            let request = Request::from_parts(metadata, extensions, stream);
            client.watch(request).await.map(tonic::Response::into_inner)
        };
        let events = self.shared.call(request, call).await?;
        Ok(Follow { entry, events })
    }
}

struct Follow {
    entry: Option<Entry>,
    events: tonic::Streaming<pb::WatchResponse>,
}

impl Follow {
    /// The state after the next change; `None` if the watch broke.
    async fn next(&mut self) -> Option<Option<Entry>> {
        loop {
            let answer = self.events.message().await.ok()??;
            // Compacted, or ended by the server: start over from the state that stands.
            if answer.canceled {
                return None;
            }
            let Some(event) = answer.events.into_iter().next_back() else { continue };
            let is_put = event.r#type() == pb::event::EventType::Put;
            return Some(event.kv.filter(|_| is_put).map(entry));
        }
    }
}

impl Shared {
    /// Calls the endpoints in turn until one answers.
    async fn call<M, R, F>(
        &self,
        message: M,
        call: impl Fn(Channel, Request<M>) -> F,
    ) -> Result<R, StoreError>
    where
        M: Clone,
        F: Future<Output = Result<R, Status>>,
    {
        let mut unanswered = "it has no endpoint".to_owned();
        let mut refused = None;
        for _ in 0..ROUNDS * self.members.len() {
            let current = self.current.load(Ordering::Relaxed) % self.members.len();
            let member = &self.members[current];
            let answer = async {
                let request = self.request(member, message.clone()).await?;
                let within = tokio::time::timeout(CALL_MAX, call(member.channel.clone(), request));
                within.await.unwrap_or_else(|_elapsed| Err(no_answer()))
            };
            let status = match answer.await {
                Ok(answer) => {
                    member.trusted.store(true, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(status) => status,
            };
            let remedy = member.distrust(&status).map_or_else(|| remedy(&status), Remedy::Distrust);
            match remedy {
                Remedy::Next => {
                    unanswered = format!("{}: {}", member.url, endpoint::causes(&status));
                    self.current.store(current + 1, Ordering::Relaxed);
                }
                Remedy::Distrust(error) => {
                    refused = Some(error);
                    self.current.store(current + 1, Ordering::Relaxed);
                }
                Remedy::Login => {
                    refused = Some(member.refusal(status.message()));
                    *self.token() = None;
                }
                Remedy::LeaseGone => return Err(StoreError::LeaseGone),
                Remedy::Refuse => return Err(member.refusal(status.message())),
            }
        }
        Err(refused.unwrap_or(StoreError::Unavailable(unanswered)))
    }

    /// The request with a token, which may need a login first.
    async fn request<M>(&self, member: &Member, message: M) -> Result<Request<M>, Status> {
        let mut request = Request::new(message);
        let Some((name, password)) = &self.user else { return Ok(request) };
        let known = self.token().clone();
        let token = match known {
            Some(token) => token,
            None => {
                let login =
                    pb::AuthenticateRequest { name: name.clone(), password: password.clone() };
                let mut client = pb::auth_client::AuthClient::new(member.channel.clone());
                let answer = tokio::time::timeout(CALL_MAX, client.authenticate(login)).await;
                let answer = answer.map_err(|_elapsed| no_answer())??;
                let token = answer.into_inner().token.parse::<MetadataValue<Ascii>>();
                let no_text = |_| Status::failed_precondition("it gave a token that is no text");
                let token = token.map_err(no_text)?;
                *self.token() = Some(token.clone());
                token
            }
        };
        request.metadata_mut().insert("token", token);
        Ok(request)
    }

    fn token(&self) -> std::sync::MutexGuard<'_, Option<MetadataValue<Ascii>>> {
        // A token is written whole.
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What to do about a call that failed.
enum Remedy {
    /// Ask the next endpoint.
    Next,
    /// The token is too old.
    Login,
    /// Ask the next endpoint, but waiting will not help this one.
    Distrust(StoreError),
    LeaseGone,
    Refuse,
}

fn no_answer() -> Status {
    Status::unavailable(format!("no answer within {CALL_MAX:?}"))
}

fn remedy(status: &Status) -> Remedy {
    match status.code() {
        Code::NotFound if status.message().contains("lease") => Remedy::LeaseGone,
        Code::Unauthenticated => Remedy::Login,
        Code::InvalidArgument if status.message().contains("auth token") => Remedy::Login,
        Code::PermissionDenied
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented => Remedy::Refuse,
        // What a dead, frozen or restarting member looks like. A time limit shows as Cancelled.
        Code::Unavailable
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Internal
        | Code::Aborted
        | Code::DataLoss
        | Code::ResourceExhausted
        | Code::AlreadyExists
        | Code::NotFound
        | Code::Ok => Remedy::Next,
    }
}

fn range(key: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.as_bytes().to_vec(), range_end: Vec::new() }
}

fn op(request: Op) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn modified(key: &str, expected: Option<Revision>) -> pb::Compare {
    let revision = expected.map_or(0, |revision| i64::try_from(revision.0).unwrap_or(i64::MAX));
    pb::Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key: key.as_bytes().to_vec(),
        target_union: Some(TargetUnion::ModRevision(revision)),
    }
}

fn created(guard: &Guard) -> pb::Compare {
    let revision = i64::try_from(guard.created.0).unwrap_or(i64::MAX);
    pb::Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Create.into(),
        key: guard.key.as_bytes().to_vec(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
    }
}

fn first(response: pb::ResponseOp) -> Option<Entry> {
    match response.response {
        Some(Done::ResponseRange(range)) => range.kvs.into_iter().next().map(entry),
        Some(Done::ResponsePut(_) | Done::ResponseDeleteRange(_)) | None => None,
    }
}

fn entry(kv: pb::KeyValue) -> Entry {
    Entry {
        value: kv.value,
        revision: revision(kv.mod_revision),
        created: revision(kv.create_revision),
        lease: Some(LeaseId(kv.lease)).filter(|lease| *lease != LeaseId(0)),
    }
}

fn header_revision(header: Option<pb::ResponseHeader>) -> Revision {
    revision(header.map_or(0, |header| header.revision))
}

/// etcd counts from 1 and never below.
fn revision(wire: i64) -> Revision {
    Revision(u64::try_from(wire).unwrap_or(0))
}

impl Store for Etcd {
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        let key = key.to_owned();
        Box::pin(async move { Ok(self.get_now(&key).await?.0) })
    }

    fn swap(&self, write: Write) -> BoxFuture<'_, Result<Swap, StoreError>> {
        Box::pin(self.swap_now(write))
    }

    fn grant(&self, ttl: Duration) -> BoxFuture<'_, Result<(LeaseId, Duration), StoreError>> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        let request = pb::LeaseGrantRequest { ttl: seconds, id: 0 };
        let call = |channel, request| async move {
            pb::lease_client::LeaseClient::new(channel)
                .lease_grant(request)
                .await
                .map(tonic::Response::into_inner)
        };
        Box::pin(async move {
            let answer = self.shared.call(request, call).await?;
            let ttl = Duration::from_secs(u64::try_from(answer.ttl).unwrap_or(0));
            Ok((LeaseId(answer.id), ttl))
        })
    }

    fn keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.keep_alive_now(lease))
    }

    fn revoke(&self, lease: LeaseId) -> BoxFuture<'_, Result<(), StoreError>> {
        let request = pb::LeaseRevokeRequest { id: lease.0 };
        let call = |channel, request| async move {
            pb::lease_client::LeaseClient::new(channel).lease_revoke(request).await
        };
        Box::pin(async move {
            match self.shared.call(request, call).await {
                Ok(_) | Err(StoreError::LeaseGone) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn watch(&self, key: &str) -> BoxStream<'static, Option<Entry>> {
        let start = (self.clone(), key.to_owned(), None::<Follow>, None::<Option<Entry>>);
        Box::pin(futures::stream::unfold(start, |(etcd, key, mut follow, last)| async move {
            loop {
                let state = match &mut follow {
                    Some(open) => open.next().await,
                    None => match etcd.follow(&key).await {
                        Ok(open) => {
                            let state = open.entry.clone();
                            follow = Some(open);
                            Some(state)
                        }
                        Err(error) => {
                            tracing::debug!(%error, key, "cannot watch; will retry");
                            tokio::time::sleep(WATCH_RETRY).await;
                            None
                        }
                    },
                };
                match state {
                    Some(state) if last.as_ref() != Some(&state) => {
                        let last = Some(state.clone());
                        return Some((state, (etcd, key, follow, last)));
                    }
                    Some(_) => {}
                    None => follow = None,
                }
            }
        }))
    }
}
