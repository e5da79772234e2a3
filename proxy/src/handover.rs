//! One process gives its listening sockets to the next one on the same machine, while both run.
//!
//! The one that serves waits at a Unix socket. Whoever connects there is its successor: it is given every listening socket,
//! accepts on them too, and says so once it serves; only then does the first one drain. So the sockets are never closed
//! and somebody accepts on them at every moment: nobody is refused, and nobody waits for a process to end. A successor
//! that leaves without that word changes nothing.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::supervisor::{Inherited, Supervised};

/// Most descriptors in one message (`SCM_MAX_FD` of unix(7)).
const MOST_FDS: usize = 253;
/// How long the process that serves may take to give its sockets away.
const PATIENCE: Duration = Duration::from_secs(10);
/// What comes with some sockets.
const SOME: u8 = b's';
/// What comes after the last ones.
const ALL: u8 = b'.';
/// What a successor says when it serves.
const SERVING: u8 = b'!';

/// The process that served until now, and goes on until it is told that it need not.
#[derive(Debug)]
pub struct Predecessor {
    stream: UnixStream,
    gone: CancellationToken,
}

/// The sockets of the process that serves at this Unix socket; `None` when nobody does.
///
/// # Errors
///
/// It does not give them.
pub async fn take_over(path: &Path) -> io::Result<Option<(Inherited, Predecessor)>> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let sockets = tokio::time::timeout(PATIENCE, receive(&stream)).await??;
    tracing::info!(sockets = sockets.len(), "took over listening sockets");
    let gone = CancellationToken::new();
    Ok(Some((Inherited::from_predecessor(sockets, gone.clone()), Predecessor { stream, gone })))
}

/// Relieves the process before this one when this one serves, and then waits for the next. Returns when that one serves:
/// this one accepts nothing more, and may drain.
///
/// # Errors
///
/// The Unix socket cannot be bound.
pub async fn relay(path: &Path, predecessor: Option<Predecessor>, supervised: &Supervised) -> io::Result<()> {
    if let Some(predecessor) = predecessor {
        supervised.has_all().await;
        predecessor.relieve().await;
    }
    let door = Door::open(path)?;
    tracing::info!(path = %path.display(), "another process may take over");
    let successor = door.successor(supervised).await;
    supervised.is_followed();
    // In this order: the successor waits there next, when this one is done.
    drop(door);
    drop(successor);
    Ok(())
}

impl Predecessor {
    /// Tells it that this process serves, and waits until it accepts nothing more.
    async fn relieve(mut self) {
        let mut nothing = [0];
        // When it is gone already, it need not be told.
        let told = async {
            self.stream.write_all(&[SERVING]).await?;
            self.stream.read(&mut nothing).await
        };
        if let Err(error) = told.await {
            tracing::info!(%error, "the process before this one is gone");
        }
        self.gone.cancel();
    }
}

/// Where the next process comes to.
#[derive(Debug)]
struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

impl Door {
    fn open(path: &Path) -> io::Result<Self> {
        // What a process that was killed left behind; a socket that somebody serves answers.
        if path.exists() && std::os::unix::net::UnixStream::connect(path).is_err() {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Waits for a successor that serves; who leaves before changes nothing.
    async fn successor(&self, supervised: &Supervised) -> UnixStream {
        loop {
            match self.meet(supervised).await {
                Ok(successor) => return successor,
                Err(error) => tracing::warn!(%error, "nobody took over; this process goes on"),
            }
        }
    }

    async fn meet(&self, supervised: &Supervised) -> io::Result<UnixStream> {
        let (mut stream, _) = self.listener.accept().await?;
        let (who, own) = (stream.peer_cred()?.uid(), nix::unistd::Uid::effective().as_raw());
        if who != own && who != 0 {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {who} asked")));
        }
        let sockets = supervised.sockets()?;
        tracing::info!(sockets = sockets.len(), "giving listening sockets to the next process");
        tokio::time::timeout(PATIENCE, send(&stream, &sockets)).await??;
        match stream.read_u8().await? {
            SERVING => Ok(stream),
            word => Err(io::Error::other(format!("the next process said {word}"))),
        }
    }
}

async fn send(stream: &UnixStream, sockets: &[OwnedFd]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    for some in sockets.chunks(MOST_FDS) {
        let some: Vec<BorrowedFd<'_>> = some.iter().map(AsFd::as_fd).collect();
        let sent = stream.async_io(Interest::WRITABLE, || {
            let mut rights = SendAncillaryBuffer::new(&mut space);
            if !rights.push(SendAncillaryMessage::ScmRights(&some)) {
                return Err(io::Error::other("too many sockets for a message"));
            }
            Ok(sendmsg(stream, &[IoSlice::new(&[SOME])], &mut rights, SendFlags::NOSIGNAL)?)
        });
        sent.await?;
    }
    let end = || {
        let mut nothing = SendAncillaryBuffer::default();
        Ok(sendmsg(stream, &[IoSlice::new(&[ALL])], &mut nothing, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, end).await?;
    Ok(())
}

async fn receive(stream: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut sockets = Vec::new();
    loop {
        let mut word = [0];
        let read = stream.async_io(Interest::READABLE, || {
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let got =
                recvmsg(stream, &mut [IoSliceMut::new(&mut word)], &mut rights, RecvFlags::CMSG_CLOEXEC)?;
            for message in rights.drain() {
                if let RecvAncillaryMessage::ScmRights(some) = message {
                    sockets.extend(some);
                }
            }
            Ok(got.bytes)
        });
        match (read.await?, word) {
            (1, [SOME]) => {}
            (1, [ALL]) => return Ok(sockets),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn as_many_sockets_arrive_as_were_sent() {
        for many in [0, 1, MOST_FDS, 2 * MOST_FDS + 1] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let sockets: Vec<OwnedFd> = (0..many).map(|_| listener.try_clone().unwrap().into()).collect();
            let (sent, received) = tokio::join!(send(&ours, &sockets), receive(&theirs));
            sent.unwrap();
            let received = received.unwrap();
            assert_eq!(received.len(), many);
            for socket in received {
                let socket = std::net::TcpListener::from(socket);
                assert_eq!(socket.local_addr().unwrap(), listener.local_addr().unwrap());
            }
        }
    }

    #[tokio::test]
    async fn who_gives_no_sockets_is_no_predecessor() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        assert!(receive(&theirs).await.is_err());
        let folder = tempfile::tempdir().unwrap();
        assert!(take_over(&folder.path().join("nobody")).await.unwrap().is_none());
        let left = folder.path().join("left");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        assert!(take_over(&left).await.unwrap().is_none(), "nobody serves there");
        drop(Door::open(&left).unwrap());
        assert!(!left.exists());
    }
}
