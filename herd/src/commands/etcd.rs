//! Flags of the roles that share an etcd.

use super::BadInput;
use anyhow::{Context, ensure};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use store::{Etcd, EtcdConfig, EtcdTls, Store, StoreError};

/// Read at the start, to see whether etcd lets this process in. Any key of ours will do.
const PROBE_KEY: &str = "/herd/leader";

#[derive(clap::Args)]
pub(crate) struct EtcdArgs {
    /// etcd, `http://host:port` or `https://host:port`; several members separated by commas. A
    /// coordinator without it keeps the cluster's state in memory and has no standby; a router without
    /// it is the only one.
    #[arg(long, env = "HERD_ETCD")]
    pub(crate) etcd: Option<String>,
    /// User of etcd.
    #[arg(long, requires = "etcd_password", env = "HERD_ETCD_USER")]
    etcd_user: Option<String>,
    /// Password of the user. Others on this machine see flags; the environment they do not.
    #[arg(long, requires = "etcd_user", env = "HERD_ETCD_PASSWORD", hide_env_values = true)]
    etcd_password: Option<String>,
    /// Certificate of the authority that etcd's certificate is from, a PEM file: for https.
    #[arg(long, env = "HERD_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// This process's certificate, a PEM file, if etcd wants one.
    #[arg(long, requires_all = ["etcd_key", "etcd_ca"], env = "HERD_ETCD_CERT")]
    etcd_cert: Option<PathBuf>,
    /// Key of that certificate, a PEM file.
    #[arg(long, requires = "etcd_cert", env = "HERD_ETCD_KEY")]
    etcd_key: Option<PathBuf>,
}

impl EtcdArgs {
    /// The store; `None` without --etcd. An etcd that does not answer may do so later; one that
    /// refuses is an error.
    pub(crate) async fn open(&self) -> anyhow::Result<Option<Arc<dyn Store>>> {
        let Some(urls) = &self.etcd else { return Ok(None) };
        let config = EtcdConfig {
            urls: urls.clone(),
            user: self.etcd_user.clone().zip(self.etcd_password.clone()),
            tls: self.tls()?,
        };
        let bad = || BadInput("--etcd cannot be used".into());
        let etcd = Etcd::new(&config).with_context(bad)?;
        match etcd.get(PROBE_KEY).await {
            Ok(_) => {}
            Err(error @ StoreError::Unavailable(_)) => {
                tracing::warn!(%error, "etcd does not answer yet; will retry");
            }
            Err(error) => return Err(error).with_context(bad),
        }
        Ok(Some(Arc::new(etcd)))
    }

    /// The URL by which the others of an election know this process, and see whether it lives.
    pub(crate) fn known_as(
        &self,
        address: &str,
        advertise: Option<&String>,
    ) -> anyhow::Result<String> {
        let listens = address.parse::<SocketAddr>();
        let is_hidden = listens.is_ok_and(|address| address.ip().is_unspecified());
        ensure!(
            self.etcd.is_none() || !is_hidden || advertise.is_some(),
            BadInput(format!(
                "nobody reaches {address} from another host, and with --etcd the others must: give \
                 --advertise HOST:PORT, or let --listen name one address of this host"
            ))
        );
        Ok(format!("http://{}", advertise.map_or(address, String::as_str)))
    }

    /// Its members' addresses.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.etcd.iter().flat_map(|urls| urls.split(',')).map(str::to_owned).collect()
    }

    /// What a child process needs to reach the same etcd, as environment: flags show to everybody.
    pub(crate) fn environment(&self) -> Vec<(&'static str, OsString)> {
        let text = |value: &Option<String>| value.clone().map(OsString::from);
        let path = |value: &Option<PathBuf>| value.clone().map(OsString::from);
        let all = [
            ("HERD_ETCD_USER", text(&self.etcd_user)),
            ("HERD_ETCD_PASSWORD", text(&self.etcd_password)),
            ("HERD_ETCD_CA", path(&self.etcd_ca)),
            ("HERD_ETCD_CERT", path(&self.etcd_cert)),
            ("HERD_ETCD_KEY", path(&self.etcd_key)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    fn tls(&self) -> anyhow::Result<Option<EtcdTls>> {
        let Some(ca) = &self.etcd_ca else { return Ok(None) };
        let identity = match (&self.etcd_cert, &self.etcd_key) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            (Some(_) | None, _) => None,
        };
        Ok(Some(EtcdTls { ca: read(ca)?, identity }))
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| BadInput(format!("cannot read {}", path.display())))
}
