//! A front end against back ends that answer, and that do what they must not.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::*;

const PATIENCE: Duration = Duration::from_millis(200);
/// One that nothing in these tests waits for.
const LONG: Duration = Duration::from_secs(60);

fn header(words: [u32; 3]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// What a back end says to a request with its payload; `None`: nothing.
type Answers = Box<dyn FnMut(u32, &[u8]) -> Option<Vec<u8>> + Send>;

/// An answer as it is to be.
fn reply(request: u32, payload: &[u8]) -> Option<Vec<u8>> {
    let mut answer = header([request, 5, payload.len() as u32]);
    answer.extend(payload);
    Some(answer)
}

/// A back end of so many features, with all protocol features that are taken.
fn good(request: u32, payload: &[u8]) -> Option<Vec<u8>> {
    match request {
        1 => reply(1, &words(&[VERSION_1 | PROTOCOL_FEATURES | 5])),
        3 | 16 => None,
        15 => reply(15, &words(&[u64::MAX])),
        17 => reply(17, &words(&[4])),
        11 => reply(11, &[payload[..4].to_vec(), 7_u32.to_ne_bytes().to_vec()].concat()),
        24 => {
            let mut answer = payload.to_vec();
            answer[12..].fill(9);
            reply(24, &answer)
        }
        request => reply(request, &words(&[0])),
    }
}

/// Serves requests until the front end hangs up; the numbers of them.
fn serve(mut answers: Answers) -> (UnixStream, JoinHandle<Vec<u32>>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let served = thread::spawn(move || {
        let mut requests = Vec::new();
        let mut head = [0; 12];
        while theirs.read_exact(&mut head).is_ok() {
            let number = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; number(8) as usize];
            theirs.read_exact(&mut payload).unwrap();
            requests.push(number(0));
            match answers(number(0), &payload) {
                Some(answer) if answer.is_empty() => break,
                Some(answer) => theirs.write_all(&answer).unwrap(),
                None => {}
            }
        }
        requests
    });
    (ours, served)
}

#[test]
fn a_queue_is_started_and_stopped_in_memory_that_is_shared() {
    let (socket, served) = serve(Box::new(good));
    let frontend = Frontend::new(socket, LONG).unwrap();
    assert_eq!((frontend.features(), frontend.queues()), (VERSION_1 | 5, 4));
    assert_eq!(frontend.config(60).unwrap(), [9; 60]);
    let file = File::open("/dev/null").unwrap();
    let region = MemoryRegion { guest: 0, length: 4096, file: file.as_fd(), offset: 0 };
    frontend.set_features(VERSION_1).unwrap();
    frontend.set_memory(&[region; 8]).unwrap();
    assert!(matches!(frontend.set_memory(&[region; 9]), Err(BackEndError::Regions)));
    let setup = VringSetup {
        size: 256,
        base: 0,
        descriptors: 0,
        available: 0,
        used: 0,
        kick: file.as_fd(),
        call: file.as_fd(),
    };
    frontend.start_queue(1, &setup).unwrap();
    assert_eq!(frontend.stop_queue(1).unwrap(), 7);
    frontend.check().unwrap();
    drop(frontend);
    assert_eq!(served.join().unwrap(), [3, 1, 15, 16, 17, 24, 2, 5, 8, 10, 9, 13, 12, 18, 11]);
}

/// Each is what a front end says of it.
#[test]
fn a_back_end_that_breaks_the_protocol_is_left() {
    let wrong =
        |request: u32, answer: Option<Vec<u8>>| {
            let (socket, _served) = serve(Box::new(move |asked, payload| {
                if asked == request { answer.clone() } else { good(asked, payload) }
            }));
            let frontend = Frontend::new(socket, PATIENCE)?;
            frontend.config(60)?;
            frontend.set_features(0)?;
            frontend.stop_queue(0).map(drop)
        };
    let says = |request, answer| wrong(request, answer).unwrap_err().to_string();
    assert_eq!(says(1, Some(vec![])), "hung up");
    assert_eq!(says(1, None), "has not answered GET_FEATURES within 0.2 s");
    assert_eq!(says(24, Some(vec![24, 0])), "has not answered GET_CONFIG within 0.2 s");
    let lacks = |features| says(1, reply(1, &words(&[features])));
    assert!(lacks(PROTOCOL_FEATURES).contains("virtio 1"));
    assert!(lacks(VERSION_1).contains("PROTOCOL_FEATURES"));
    assert!(says(15, reply(15, &words(&[0]))).contains("PROTOCOL_F_CONFIG"));
    assert_eq!(says(2, reply(2, &words(&[1]))), "refused SET_FEATURES");
    // Of another length, to another request, no answer at all, of another version.
    for answer in [[1, 5, 4], [1, 5, u32::MAX], [2, 5, 8], [1, 1, 8], [1, 6, 8]] {
        let mut bytes = header(answer);
        bytes.extend([0; 8]);
        assert_eq!(says(1, Some(bytes)), "answered GET_FEATURES with something else");
    }
    // A configuration, or a queue, that was not asked for.
    let mut config = vec![0; 72];
    config[0] = 1;
    assert_eq!(says(24, reply(24, &config)), "answered GET_CONFIG with something else");
    assert_eq!(says(24, reply(24, &config[..12])), "answered GET_CONFIG with something else");
    let base = |index, base| reply(11, &state(index, base));
    assert_eq!(says(11, base(1, 0)), "answered GET_VRING_BASE with something else");
    assert_eq!(says(11, base(0, 1 << 16)), "answered GET_VRING_BASE with something else");
}

#[test]
fn what_comes_unasked_or_with_descriptors_is_refused() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let connection = Connection::new(ours, LONG).unwrap();
    connection.check().unwrap();
    theirs.write_all(b"x").unwrap();
    assert!(matches!(connection.check(), Err(BackEndError::Unasked)));
    drop(theirs);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = Connection::new(ours, LONG).unwrap();
    let file = File::open("/dev/null").unwrap();
    let files = [file.as_fd(); 3];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let bytes = [std::io::IoSlice::new(&[0; 12])];
    sendmsg(&theirs, &bytes, &mut control, SendFlags::empty()).unwrap();
    let answer = connection.answer(Request::GetFeatures, 8);
    assert!(matches!(answer, Err(BackEndError::Descriptors)));

    drop(theirs);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let connection = Connection::new(ours, LONG).unwrap();
    drop(theirs);
    assert!(matches!(connection.check(), Err(BackEndError::Closed)));
    let sent = connection.send(Request::GetFeatures, false, &[], &[]);
    assert!(matches!(sent, Err(BackEndError::Closed)));
}

/// Whatever bytes come, there is an end, and it is no answer of another kind.
#[test]
fn noise_ends_in_an_error_or_an_answer() {
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..2000 {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, LONG).unwrap();
        let mut noise = header([11, 5, 8]);
        noise.extend(words(&[random(), random()]));
        for _ in 0..random() % 4 {
            let at = random() as usize % noise.len();
            noise[at] ^= random() as u8;
        }
        noise.truncate(random() as usize % 28);
        theirs.write_all(&noise).unwrap();
        drop(theirs);
        let whole = noise.len() >= 20;
        match connection.answer(Request::GetVringBase, 8) {
            Ok(answer) => assert!(whole && answer == noise[12..20]),
            Err(BackEndError::Closed | BackEndError::Answer(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
