//! Whole snapshots from member to member: pieces of a file, so that no message and no queue holds all of it.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::links::Client;
use crate::raft::snapshots::{Incoming, Outgoing, SnapshotError, Snapshots};
use crate::raft::wire::snapshot_part::Part;
use crate::raft::wire::{
    Message, Snapshot, SnapshotChunk, SnapshotMetadata, SnapshotOffer, SnapshotPart, SnapshotProgress,
};

/// Bytes in one piece.
const PIECE: usize = 512 << 10;
/// Pieces read ahead of the network.
const PIECES: usize = 4;
/// A transfer in which nothing moves for this long is given up.
const STALLED: Duration = Duration::from_secs(30);

/// Sends the snapshot that `message` announces, from its file; gives its bytes.
///
/// # Errors
///
/// Why the peer does not have it, for people. A later transfer goes on from where this one stopped.
pub(super) async fn send(mut client: Client, files: Snapshots, message: Message) -> Result<u64, String> {
    let metadata = message.snapshot.as_ref().and_then(|snapshot| snapshot.metadata.clone());
    let metadata = metadata.ok_or("the announcement names no snapshot")?;
    let outgoing = files.outgoing(metadata.index, metadata.term).map_err(|error| error.to_string())?;
    let length = outgoing.length();
    let (pieces, queue) = mpsc::channel(PIECES);
    let offer = SnapshotPart { part: Some(Part::Offer(SnapshotOffer { message: Some(message), length })) };
    pieces.send(offer).await.map_err(|_| "the peer closed the stream")?;
    let answer = client.install_snapshot(ReceiverStream::new(queue)).await;
    let mut progress = answer.map_err(|status| status.to_string())?.into_inner();
    let first = next(&mut progress).await?;
    send_pieces(outgoing, first.offset, length, &pieces).await?;
    loop {
        if next(&mut progress).await?.complete {
            return Ok(length);
        }
    }
}

async fn next(progress: &mut Streaming<SnapshotProgress>) -> Result<SnapshotProgress, String> {
    let told = tokio::time::timeout(STALLED, progress.message()).await;
    let told = told.map_err(|_| "the transfer has stalled")?;
    told.map_err(|status| status.to_string())?.ok_or_else(|| "the peer closed the stream".to_owned())
}

async fn send_pieces(
    mut outgoing: Outgoing,
    mut offset: u64,
    length: u64,
    pieces: &mpsc::Sender<SnapshotPart>,
) -> Result<(), String> {
    while offset < length {
        let (file, read) = spawn_blocking(move || {
            let read = outgoing.read(offset, PIECE);
            (outgoing, read)
        })
        .await
        .map_err(|error| error.to_string())?;
        outgoing = file;
        let data = Bytes::from(read.map_err(|error| error.to_string())?);
        if data.is_empty() {
            return Err("the file ended early".to_owned());
        }
        let next = offset + data.len() as u64;
        let chunk = SnapshotChunk { offset, crc32c: crc32c::crc32c(&data), data };
        let sent = pieces.send_timeout(SnapshotPart { part: Some(Part::Chunk(chunk)) }, STALLED).await;
        sent.map_err(|_| "the transfer has stalled")?;
        offset = next;
    }
    Ok(())
}

/// Receives a snapshot that a peer offers; gives the announcement with the data in it, and the way to tell the sender
/// that it has arrived.
///
/// # Errors
///
/// What the sender is told.
pub(super) async fn receive(
    parts: &mut Streaming<SnapshotPart>,
    files: &Snapshots,
    from: u64,
    progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
) -> Result<Message, Status> {
    let Some(Part::Offer(SnapshotOffer { message: Some(mut message), length })) = part(parts).await? else {
        return Err(Status::invalid_argument("the first part must be an offer"));
    };
    let metadata = message.snapshot.take().and_then(|snapshot| snapshot.metadata);
    let metadata = metadata.ok_or_else(|| Status::invalid_argument("the offer names no snapshot"))?;
    if message.from != from {
        return Err(Status::permission_denied("a peer speaks only for itself"));
    }
    let point = (metadata.index, metadata.term);
    let place = files.clone();
    let mut incoming = blocking(move || place.incoming(point, length)).await?;
    let offset = incoming.offset();
    tracing::info!(peer = from, index = point.0, bytes = length, from_byte = offset, "receiving a snapshot");
    tell(progress, SnapshotProgress { offset, complete: false }).await?;
    while !incoming.is_whole() {
        let Some(Part::Chunk(chunk)) = part(parts).await? else {
            return Err(Status::invalid_argument("a chunk was expected"));
        };
        incoming = write(incoming, chunk).await?;
    }
    let (metadata, data) = blocking(move || incoming.finish()).await?;
    message.snapshot = Some(whole(metadata, data));
    Ok(message)
}

fn whole(metadata: SnapshotMetadata, data: Bytes) -> Snapshot {
    Snapshot { data, metadata: Some(metadata) }
}

async fn write(mut incoming: Incoming, chunk: SnapshotChunk) -> Result<Incoming, Status> {
    if crc32c::crc32c(&chunk.data) != chunk.crc32c {
        return Err(Status::data_loss("a chunk does not match its checksum"));
    }
    let (incoming, fits) = blocking(move || {
        let fits = incoming.write(chunk.offset, &chunk.data)?;
        Ok((incoming, fits))
    })
    .await?;
    if fits { Ok(incoming) } else { Err(Status::out_of_range("a chunk is out of order")) }
}

async fn part(parts: &mut Streaming<SnapshotPart>) -> Result<Option<Part>, Status> {
    let next = tokio::time::timeout(STALLED, parts.message()).await;
    let next = next.map_err(|_| Status::deadline_exceeded("the transfer has stalled"))??;
    Ok(next.ok_or_else(|| Status::cancelled("the sender closed the stream"))?.part)
}

async fn tell(
    progress: &mpsc::Sender<Result<SnapshotProgress, Status>>,
    message: SnapshotProgress,
) -> Result<(), Status> {
    progress.send(Ok(message)).await.map_err(|_| Status::cancelled("the sender has gone"))
}

async fn blocking<R: Send + 'static>(
    action: impl FnOnce() -> Result<R, SnapshotError> + Send + 'static,
) -> Result<R, Status> {
    let done = spawn_blocking(action).await.map_err(|error| Status::internal(error.to_string()))?;
    done.map_err(|error| Status::data_loss(error.to_string()))
}
