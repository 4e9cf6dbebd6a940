//! A short run of the fuzz target for images: with what once found something, and with
//! random input that is the same each time. docs/fuzzing.md has more.

mod harness;
#[path = "../../virtio/tests/smoke/mod.rs"]
mod smoke;

#[test]
fn findings_stay_fixed() {
    for (path, data) in harness::corpus() {
        println!("{}", path.display());
        harness::image(&data);
    }
}

#[test]
fn random_patches_of_images_are_errors_at_most() {
    smoke::run(40, |byte| 1 + 12 * usize::from(1 + byte % 8), harness::image);
}
