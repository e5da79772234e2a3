//! `backup` and `restore`.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use ca::identity::TrustDomain;
use ca::keystore::KeyStore;
use istiod::authority::AUTHORITY_FILES;
use istiod::backup::{self, AuthorityFiles, Cost, Manifest, Opener, Sealer, Secret};
use istiod::raft::restore::{Target, restore as found};
use zeroize::Zeroizing;

use crate::cli::{Backup, Restore, Sealing};
use crate::client::Client;
use crate::output::note;

/// Headers of the answer, see `istiod::api::rest::backup`.
use istiod::api::rest::backup::{REVISION, TRUST_DOMAIN};

/// Folder of a member's authority in its data folder.
const AUTHORITY: &str = "ca";

/// Writes a backup of the control plane.
///
/// # Errors
///
/// What was refused, or files that cannot be read or written. A file that is not whole is removed.
pub(crate) async fn backup(client: &Client, args: &Backup) -> anyhow::Result<ExitCode> {
    let secret = secret(&args.sealing)?;
    let authority = args.with_authority.as_deref().map(authority).transpose()?;
    let out = private_file(&args.file)?;
    let written = write(client, &secret, authority, BufWriter::new(out)).await;
    match written {
        Ok((revision, bytes)) => {
            note(&format!(
                "revision {revision}: {bytes} bytes of state are sealed in {}",
                args.file.display()
            ));
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            std::fs::remove_file(&args.file).unwrap_or_default();
            Err(error)
        }
    }
}

async fn write(
    client: &Client,
    secret: &Secret,
    authority: Option<AuthorityFiles>,
    out: BufWriter<File>,
) -> anyhow::Result<(u64, u64)> {
    let salt = random()?;
    let sealer = std::cell::RefCell::new(Sealer::new(out, secret, Cost::default(), salt)?);
    let (mut revision, mut expected, mut bytes) = (0, None, 0_u64);
    let head = |headers: &http::HeaderMap| {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        revision = text(REVISION).and_then(|text| text.parse().ok()).context("the answer has no revision")?;
        expected = text("content-length").and_then(|text| text.parse().ok());
        let domain = text(TRUST_DOMAIN).context("the answer has no trust domain")?;
        let created_ms = jiff::Timestamp::now().as_millisecond();
        Manifest::new(revision, domain, created_ms, authority).write(&mut *sealer.borrow_mut())?;
        Ok(())
    };
    let take = |piece: &bytes::Bytes| {
        bytes += piece.len() as u64;
        Ok(sealer.borrow_mut().write_all(piece)?)
    };
    client.download("/backup", head, take).await?;
    if expected != Some(bytes) {
        bail!("the connection ended after {bytes} bytes of the state");
    }
    let out = sealer.into_inner().finish()?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok((revision, bytes))
}

/// Makes the first member of a new cluster from a backup.
///
/// # Errors
///
/// A backup that does not open, and a data folder that is used.
pub(crate) fn restore(args: &Restore) -> anyhow::Result<ExitCode> {
    let secret = secret(&args.sealing)?;
    let file = File::open(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    let mut from = BufReader::new(file);
    let header = backup::header(&mut from)?;
    let mut opener = Opener::new(from, header, &secret)?;
    let manifest = Manifest::read(&mut opener)?;
    let mut bytes = Vec::new();
    opener.read_to_end(&mut bytes)?;
    let state = backup::restorable(manifest.revision, &bytes)?;
    drop(bytes);
    let domain = TrustDomain::parse(&manifest.trust_domain)?;
    let target =
        Target { data_dir: &args.data_dir, id: args.member, trust_domain: &domain, force: args.force };
    let store = match &manifest.authority {
        Some(files) => Some((room_for_authority(&args.data_dir, args.force)?, files)),
        None => None,
    };
    let aside = found(target, &state, &mut fastrand::Rng::new())?;
    if let Some(aside) = aside {
        note(&format!("what was there is now in {}", aside.display()));
    }
    match store {
        Some((store, files)) => put_authority(&store, files)?,
        None => note(
            "the backup has no root certificate: plug in the mesh's authority before the first start, or a new root is made and every workload joins again",
        ),
    }
    note(&format!("revision {} is restored; start istiod on {}", manifest.revision, args.data_dir.display()));
    Ok(ExitCode::SUCCESS)
}

fn secret(sealing: &Sealing) -> anyhow::Result<Secret> {
    match (&sealing.passphrase_file, &sealing.key_file) {
        (Some(file), _) => {
            let mut line = Zeroizing::new(String::new());
            let read = if file.as_os_str() == "-" {
                std::io::stdin().lock().read_line(&mut line)
            } else {
                File::open(file).and_then(|open| BufReader::new(open).read_line(&mut line))
            };
            read.with_context(|| format!("cannot read {}", file.display()))?;
            let text = Zeroizing::new(line.trim_end_matches(['\r', '\n']).to_owned());
            Ok(Secret::passphrase(text)?)
        }
        (None, Some(file)) => {
            let bytes = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            Ok(Secret::key_file(Zeroizing::new(bytes))?)
        }
        (None, None) => bail!("--passphrase-file or --key-file is needed"),
    }
}

/// A new file that nobody else reads.
fn private_file(path: &Path) -> anyhow::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let made = File::options().write(true).create_new(true).mode(0o600).open(path);
    made.with_context(|| format!("cannot make {}; it must not exist", path.display()))
}

fn random() -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("no randomness")?;
    Ok(bytes)
}

/// The files of the authority in a member's data folder.
fn authority(data_dir: &Path) -> anyhow::Result<AuthorityFiles> {
    let store = KeyStore::open(data_dir.join(AUTHORITY))?;
    let mut files = AuthorityFiles::new();
    for name in AUTHORITY_FILES {
        let bytes = store.load(name)?.with_context(|| format!("{} has no {name}", store.dir().display()))?;
        files.insert(name.to_owned(), Zeroizing::new(String::from_utf8(bytes.to_vec())?));
    }
    Ok(files)
}

/// The folder for the authority, which is empty; a used one is moved aside if that is forced.
fn room_for_authority(data_dir: &Path, force: bool) -> anyhow::Result<KeyStore> {
    let dir = data_dir.join(AUTHORITY);
    let used = std::fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some());
    if used && !force {
        bail!("{} holds an authority already; restore into an empty data folder, or force it", dir.display());
    }
    if used {
        let free = |number: u32| -> PathBuf { data_dir.join(format!("{AUTHORITY}.before-restore-{number}")) };
        let aside = (1..).map(free).find(|path| !path.exists()).context("no free name")?;
        std::fs::rename(&dir, &aside)?;
        note(&format!("the authority that was there is now in {}", aside.display()));
    }
    Ok(KeyStore::open(dir)?)
}

/// The key last: without it the folder counts as empty at the next start.
fn put_authority(store: &KeyStore, files: &AuthorityFiles) -> anyhow::Result<()> {
    let known = |name: &&str| AUTHORITY_FILES.contains(name);
    anyhow::ensure!(
        files.keys().all(|name| known(&name.as_str())),
        "the backup names a file that no authority has"
    );
    let (keys, others): (Vec<_>, Vec<_>) = files.iter().partition(|(name, _)| name.contains("key"));
    others.into_iter().chain(keys).try_for_each(|(name, text)| store.store(name, text.as_bytes()))?;
    Ok(())
}
