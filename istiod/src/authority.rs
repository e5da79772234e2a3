//! This member's certificate authority: where its root comes from, its intermediate, and its own certificate.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use arc_swap::ArcSwap;
use ca::authority::{Authority, Lifetimes, PluggedIn, Serial, SigningRoot};
use ca::client::{CertificateSource, Local};
use ca::identity::{SpiffeId, TrustDomain};
use ca::keystore::KeyStore;
use ca::renewal::Clock;
use ca::tls::IdentityWatch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use zeroize::Zeroizing;

use crate::config::Config;

/// Names of the files of a plugged-in authority, as Istio's; a self-signed root is kept under the same names.
const FILES: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];

/// The files of a member's own authority, in the folder `ca` of its data folder.
pub const AUTHORITY_FILES: [&str; 4] = FILES;

/// Names in the control plane's own certificate, by which agents of Istio and programs on this machine call it.
const NAMES: [&str; 4] =
    ["istiod.istio-system.svc", "istiod.istio-system.svc.cluster.local", "localhost", "127.0.0.1"];

/// The trust bundle, for clients such as `istioctl`, in the data folder.
const ROOT_FILE: &str = "root-cert.pem";

/// How often the age of the member's intermediate is looked at.
const LOOK: Duration = Duration::from_secs(3600);

/// The authority that signs at present: replaced when its intermediate has lived half its life.
pub(crate) type Issuing = Arc<ArcSwap<Authority>>;

/// What the authority is opened with.
pub(crate) struct Settings<'a> {
    /// Folder of this member's secrets.
    pub(crate) folder: &'a Path,
    /// Folder with a plugged-in authority.
    pub(crate) plugged_in: Option<&'a Path>,
    /// Trust domain of the mesh.
    pub(crate) domain: TrustDomain,
    /// Lifetimes of leaves.
    pub(crate) lifetimes: Lifetimes,
    /// Name of this member in its intermediate.
    pub(crate) member: String,
}

/// Opens the root (plugged in, kept from an earlier start, or made now), and makes this member's intermediate.
///
/// # Errors
///
/// When files cannot be read, do not belong together, or have ended.
pub(crate) fn open(settings: &Settings<'_>, now: SystemTime) -> anyhow::Result<Issuing> {
    let authority = issue(settings, now)?;
    publish_root(settings.folder, &authority)?;
    Ok(Arc::new(ArcSwap::new(authority)))
}

/// Replaces the intermediate when it has lived half its life, until `stop`. What it signed stays valid; peers trust
/// the root.
pub(crate) async fn keep(config: Config, issuing: Issuing, clock: Clock, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let now = clock();
        if !is_due(&issuing.load(), now) {
            continue;
        }
        let settings = config.clone();
        let issued = tokio::task::spawn_blocking(move || issue(&settings.authority(), now)).await;
        match issued.map_err(anyhow::Error::from).flatten() {
            Ok(next) => {
                issuing.store(next);
                tracing::info!("renewed this member's intermediate certificate");
            }
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "this member's intermediate is not renewed");
            }
        }
    }
}

fn is_due(authority: &Authority, now: SystemTime) -> bool {
    let (begin, end) = authority.validity();
    now >= begin + end.duration_since(begin).unwrap_or_default() / 2
}

/// Replaces the file as a whole, so that nobody reads half of it.
fn publish_root(folder: &Path, authority: &Authority) -> anyhow::Result<()> {
    let (path, next) = (folder.join(ROOT_FILE), folder.join(format!("{ROOT_FILE}.next")));
    let pem = ca::x509::certificates_to_pem(authority.roots());
    std::fs::write(&next, pem)
        .and_then(|()| std::fs::rename(&next, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn issue(settings: &Settings<'_>, now: SystemTime) -> anyhow::Result<Arc<Authority>> {
    let root = match settings.plugged_in {
        Some(folder) => plugged_in(folder, now)?,
        None => kept(settings, now)?,
    };
    let authority =
        root.member(&settings.domain, &settings.member, settings.lifetimes, now, Serial::random()?)?;
    Ok(Arc::new(authority))
}

fn plugged_in(folder: &Path, now: SystemTime) -> anyhow::Result<SigningRoot> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let [cert, key, chain, root] = FILES;
    let files = PluggedIn {
        ca_cert: read(cert)?,
        ca_key: Zeroizing::new(read(key)?),
        cert_chain: read(chain)?,
        root_cert: read(root)?,
    };
    files.check(now).with_context(|| format!("the authority in {} cannot be used", folder.display()))
}

/// The self-signed root of an earlier start, or a new one.
fn kept(settings: &Settings<'_>, now: SystemTime) -> anyhow::Result<SigningRoot> {
    let store = KeyStore::open(settings.folder.join("ca"))?;
    let [cert, key, chain, root] = FILES;
    // The key is written last, so that a first start that was cut short begins anew.
    if store.load(key)?.is_some() {
        let read = |name: &str| -> anyhow::Result<String> {
            let bytes =
                store.load(name)?.with_context(|| format!("{} has no {name}", store.dir().display()))?;
            Ok(String::from_utf8(bytes.to_vec())?)
        };
        let files = PluggedIn {
            ca_cert: read(cert)?,
            ca_key: Zeroizing::new(read(key)?),
            cert_chain: read(chain)?,
            root_cert: read(root)?,
        };
        return files
            .check(now)
            .with_context(|| format!("the root in {} cannot be used", store.dir().display()));
    }
    let made = SigningRoot::generate(&settings.domain, now, Serial::random()?)?;
    let files = made.to_files();
    store.store(root, files.root_cert.as_bytes())?;
    store.store(chain, files.cert_chain.as_bytes())?;
    store.store(cert, files.ca_cert.as_bytes())?;
    store.store(key, files.ca_key.as_bytes())?;
    tracing::info!(trust_domain = settings.domain.as_str(), "made a new root certificate");
    Ok(made)
}

/// The self-signed root of this member, to be sealed for the others; nothing if there is none.
///
/// # Errors
///
/// When the files cannot be read.
pub(crate) fn export(folder: &Path) -> anyhow::Result<Option<Zeroizing<Vec<u8>>>> {
    let store = KeyStore::open(folder.join("ca"))?;
    let mut files = std::collections::BTreeMap::new();
    for name in FILES {
        let Some(bytes) = store.load(name)? else { return Ok(None) };
        files.insert(name, Zeroizing::new(String::from_utf8(bytes.to_vec())?));
    }
    let texts: std::collections::BTreeMap<&str, &str> =
        files.iter().map(|(name, text)| (*name, text.as_str())).collect();
    Ok(Some(Zeroizing::new(serde_json::to_vec(&texts)?)))
}

/// Keeps the root that another member exported; one that is here already stays.
///
/// # Errors
///
/// When it cannot be read or written.
pub(crate) fn import(folder: &Path, exported: &[u8]) -> anyhow::Result<()> {
    let store = KeyStore::open(folder.join("ca"))?;
    let [cert, key, chain, root] = FILES;
    if store.load(key)?.is_some() {
        return Ok(());
    }
    let texts: std::collections::BTreeMap<String, Zeroizing<String>> = {
        let plain: std::collections::BTreeMap<String, String> = serde_json::from_slice(exported)?;
        plain.into_iter().map(|(name, text)| (name, Zeroizing::new(text))).collect()
    };
    // The key last, as where a root is made.
    for name in [root, chain, cert, key] {
        let text = texts.get(name).with_context(|| format!("the sealed root has no {name}"))?;
        store.store(name, text.as_bytes())?;
    }
    Ok(())
}

/// Whether this member has the mesh's root key, or a plugged-in authority in its place.
///
/// # Errors
///
/// When the folder cannot be read.
pub(crate) fn is_here(settings: &Settings<'_>) -> anyhow::Result<bool> {
    let [_, key, ..] = FILES;
    let folder = settings.folder.join("ca");
    Ok(settings.plugged_in.is_some() || KeyStore::open(folder)?.load(key)?.is_some())
}

/// This member's own certificate, renewed on `tasks` until `stop`.
///
/// # Errors
///
/// When the authority cannot sign it.
pub(crate) async fn own_identity(
    issuing: Issuing,
    names: Vec<String>,
    clock: Clock,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> anyhow::Result<IdentityWatch> {
    let expected = SpiffeId::control_plane(issuing.load().trust_domain());
    let mut dns_names = NAMES.map(str::to_owned).to_vec();
    dns_names.extend(names.into_iter().filter(|name| !NAMES.contains(&name.as_str())));
    let source = CertificateSource {
        issuance: Local { authority: Box::new(move || issuing.load_full()), dns_names, clock: clock.clone() },
        clock,
        store: None,
        lifetime: None,
        expected: Some(expected),
        rng: fastrand::Rng::new(),
    };
    Ok(source.start(tasks, stop).await?)
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    fn open_in(folder: &Path, plugged_in: Option<&Path>) -> anyhow::Result<Arc<Authority>> {
        let settings = Settings {
            folder,
            plugged_in,
            domain: TrustDomain::parse("cluster.local")?,
            lifetimes: Lifetimes::default(),
            member: "1".to_owned(),
        };
        Ok(open(&settings, UNIX_EPOCH + Duration::from_secs(1_800_000_000))?.load_full())
    }

    #[test]
    fn a_self_signed_root_survives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let first = open_in(folder.path(), None).unwrap();
        let second = open_in(folder.path(), None).unwrap();
        assert_eq!(first.roots(), second.roots());
        assert_ne!(first.chain(), second.chain(), "every start has an intermediate of its own");
    }

    #[test]
    fn another_member_issues_from_the_same_root() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(export(first.path()).unwrap().is_none());
        let root = open_in(first.path(), None).unwrap();
        import(second.path(), &export(first.path()).unwrap().unwrap()).unwrap();
        assert_eq!(open_in(second.path(), None).unwrap().roots(), root.roots());
    }

    #[test]
    fn an_intermediate_is_due_at_half_its_life_and_the_root_is_there_to_read() {
        let folder = tempfile::tempdir().unwrap();
        let authority = open_in(folder.path(), None).unwrap();
        let (begin, end) = authority.validity();
        let half = begin + end.duration_since(begin).unwrap() / 2;
        assert!(!is_due(&authority, half - Duration::from_secs(1)) && is_due(&authority, half));
        let pem = std::fs::read_to_string(folder.path().join(ROOT_FILE)).unwrap();
        assert_eq!(pem, ca::x509::certificates_to_pem(authority.roots()));
    }

    #[test]
    fn a_plugged_in_authority_is_used_and_checked() {
        let (made, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = open_in(made.path(), None).unwrap();
        let files = made.path().join("ca");
        assert_eq!(open_in(folder.path(), Some(&files)).unwrap().roots(), root.roots());
        std::fs::write(files.join("ca-key.pem"), "nonsense").unwrap();
        let error = format!("{:#}", open_in(folder.path(), Some(&files)).unwrap_err());
        assert!(error.contains("ca-key.pem"), "{error}");
    }
}
