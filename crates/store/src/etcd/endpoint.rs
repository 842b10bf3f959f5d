//! How to reach an etcd cluster, and what its refusals mean to whoever configured it.

use super::CALL_MAX;
use crate::StoreError;
use std::error::Error;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// etcd closes connections that ping more often than every five seconds.
const PING: Duration = Duration::from_secs(6);
const PING_MAX: Duration = Duration::from_secs(2);

/// How to reach an etcd cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://host:port` or `https://host:port`, several separated by commas.
    pub urls: String,
    /// User and password, if the cluster wants them.
    pub user: Option<(String, String)>,
    /// For `https://`.
    pub tls: Option<EtcdTls>,
}

/// Certificates, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Whoever has signed the server's certificate.
    pub ca: Vec<u8>,
    /// This client's certificate and its key, if the cluster wants them.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// One member of the cluster.
pub(super) struct Member {
    pub(super) url: String,
    pub(super) channel: Channel,
    /// It has answered a call.
    pub(super) trusted: AtomicBool,
}

impl Member {
    /// Connects when it is first used.
    pub(super) fn new(url: &str, tls: Option<&EtcdTls>) -> Result<Self, StoreError> {
        let url = url.trim().to_owned();
        let refuse = |error: &dyn std::fmt::Display| {
            StoreError::Refused(format!("{url} is no URL of etcd: {error}"))
        };
        let mut endpoint = Endpoint::from_shared(url.clone()).map_err(|error| refuse(&error))?;
        match endpoint.uri().scheme_str() {
            Some("http") => {}
            Some("https") => {
                let Some(tls) = tls else {
                    let text = "https needs the certificate of its authority; give --etcd-ca FILE";
                    return Err(StoreError::Refused(format!("{url}: {text}")));
                };
                let mut config =
                    ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca));
                if let Some((certificate, key)) = &tls.identity {
                    config = config.identity(Identity::from_pem(certificate, key));
                }
                let unusable = |error: tonic::transport::Error| {
                    let text = causes(&error);
                    StoreError::Refused(format!(
                        "{url}: the certificates cannot be used: {text}; check the PEM files of \
                         --etcd-ca, --etcd-cert and --etcd-key"
                    ))
                };
                endpoint = endpoint.tls_config(config).map_err(unusable)?;
            }
            Some(_) | None => return Err(refuse(&"it must begin with http:// or https://")),
        }
        let endpoint = endpoint
            .connect_timeout(CALL_MAX)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING_MAX)
            .keep_alive_while_idle(true);
        Ok(Self { channel: endpoint.connect_lazy(), url, trusted: AtomicBool::new(false) })
    }

    /// The error of a call that failed because the two sides do not trust or understand each other:
    /// waiting will not help.
    pub(super) fn distrust(&self, status: &Status) -> Option<StoreError> {
        let text = causes(status);
        let has = |what: &str| text.contains(what);
        // Whoever refuses a certificate says so and hangs up; the second may overtake the first.
        let hangs_up = self.url.starts_with("https:")
            && !self.trusted.load(Ordering::Relaxed)
            && is_hangup(&text);
        let remedy = if has("received fatal alert") {
            "etcd refuses this client's certificate; give --etcd-cert and --etcd-key that its \
             authority has signed"
        } else if has("invalid peer certificate") {
            "its certificate is not of the authority in --etcd-ca, or for another host; correct \
             --etcd-ca or the URL"
        } else if has("InvalidContentType") || has("tls handshake eof") {
            "if etcd does not speak TLS there, use http://"
        } else if hangs_up {
            "etcd hangs up: if it wants a certificate, give --etcd-cert and --etcd-key that its \
             authority has signed; if it does not speak TLS there, use http://"
        } else {
            return None;
        };
        Some(StoreError::Refused(format!("{}: {text}; {remedy}", self.url)))
    }

    /// A refusal of etcd itself, with what to do about it.
    pub(super) fn refusal(&self, message: &str) -> StoreError {
        let remedy = if message.contains("authentication failed") {
            "; correct --etcd-user and --etcd-password"
        } else if message.contains("user name is empty") {
            "; etcd wants a login, give --etcd-user and --etcd-password"
        } else if message.contains("authentication is not enabled") {
            "; etcd wants no login, leave --etcd-user out"
        } else if message.contains("permission denied") {
            "; the user of --etcd-user needs to read and write keys under /herd/"
        } else {
            ""
        };
        StoreError::Refused(format!("{}: {message}{remedy}", self.url))
    }
}

/// That the other side has closed a connection, in the words of the system (`Broken pipe`), of h2
/// (`... because of a broken pipe`) and of hyper (`connection closed`). h2 hides the kind of the error.
fn is_hangup(text: &str) -> bool {
    let text = text.to_lowercase();
    ["connection reset", "connection aborted", "broken pipe", "connection closed", "not connected"]
        .into_iter()
        .any(|words| text.contains(words))
}

/// An error with its causes: tonic's own text hides them.
pub(super) fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut last = String::new();
    let chain = std::iter::successors(Some(error), |error| (*error).source());
    for error in chain {
        let own = match error.downcast_ref::<Status>() {
            Some(status) => status.message().to_owned(),
            None => error.to_string(),
        };
        // Wrappers often repeat what they wrap.
        if own != last && !last.contains(&own) {
            let separator = if text.is_empty() { "" } else { ": " };
            // Writing to a string cannot fail.
            let _written = write!(text, "{separator}{own}");
            last = own;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(url: &str) -> Member {
        let tls = EtcdTls { ca: Vec::new(), identity: None };
        Member::new(url, Some(&tls)).unwrap()
    }

    #[tokio::test]
    async fn hangup_before_the_first_answer_is_explained_in_whatever_words_it_comes() {
        let hangups = [
            "connection error: Connection reset by peer (os error 104)",
            "connection error: Broken pipe (os error 32)",
            "connection error: stream closed because of a broken pipe",
            "connection error: connection closed because of a broken pipe",
            "operation was canceled: connection closed",
            "Transport endpoint is not connected (os error 107)",
        ];
        let secure = member("https://127.0.0.1:9");
        for text in hangups {
            let status = Status::unavailable(text);
            let Some(StoreError::Refused(said)) = secure.distrust(&status) else {
                panic!("{text:?} is not explained");
            };
            assert!(said.contains("give --etcd-cert and --etcd-key"), "{said:?}");
            let open = member("http://127.0.0.1:9").distrust(&status);
            assert!(open.is_none(), "{text:?}: without TLS it is a restart, {open:?}");
        }
        let refused = Status::unavailable("tcp connect error: Connection refused (os error 111)");
        assert!(secure.distrust(&refused).is_none(), "nobody listens: waiting may help");
        secure.trusted.store(true, Ordering::Relaxed);
        let later = secure.distrust(&Status::unavailable(hangups[2]));
        assert!(later.is_none(), "it has answered before: it restarts, {later:?}");
    }
}
