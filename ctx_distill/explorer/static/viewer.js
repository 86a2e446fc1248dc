// NiiVue with three planes and one overlay. NiiVue is loaded only when there is a scan to show.
const WINDOWS = { lung: [-1350, 150], soft: [-160, 240], bone: [-500, 1300] };
// Share of the peak below which a map is transparent; otherwise it would cover the complete scan.
const FLOOR = 0.3;

export class Viewer {
  constructor(canvas, onLocation) {
    this.canvas = canvas;
    this.onLocation = onLocation;
    this.strength = 0.45;
  }

  async open(url) {
    const { Niivue, SLICE_TYPE, SHOW_RENDER } = await import("/niivue.js");
    this.planes = SLICE_TYPE;
    this.nv = new Niivue({
      isRadiologicalConvention: true, sagittalNoseLeft: true, isOrientCube: false, isColorbar: false,
      multiplanarShowRender: SHOW_RENDER.NEVER, show3Dcrosshair: false, crosshairColor: [0.94, 0.89, 0.26, 0.8], crosshairWidth: 0.8, crosshairWidthUnit: "mm", crosshairGap: 12, showAllOrientationMarkers: true,
      backColor: [0, 0, 0, 1], fontColor: [1, 1, 1, 1], fontMinPx: 13, isSliceMM: true, loadingText: "", logLevel: "error",
      dragAndDropEnabled: false, isNearestInterpolation: false, isHighResolutionCapable: true,
    });
    this.nv.onLocationChange = (place) => this.onLocation(place);
    await this.nv.attachToCanvas(this.canvas);
    const [low, high] = WINDOWS.lung;
    await this.nv.loadVolumes([{ url, name: "scan.nii", colormap: "gray", cal_min: low, cal_max: high }]);
    this.arrange();
    this.watching = new ResizeObserver(() => this.arrange());
    this.watching.observe(this.canvas.parentElement);
  }

  // The axial plane is large; the other two are beside it, or below it on a narrow screen.
  arrange() {
    const { AXIAL, CORONAL, SAGITTAL } = this.planes;
    const wide = this.canvas.clientWidth > 560;
    this.nv.setCustomLayout(wide
      ? [{ sliceType: AXIAL, position: [0, 0, 0.62, 1] }, { sliceType: CORONAL, position: [0.62, 0, 0.38, 0.5] },
         { sliceType: SAGITTAL, position: [0.62, 0.5, 0.38, 0.5] }]
      : [{ sliceType: AXIAL, position: [0, 0, 1, 0.58] }, { sliceType: CORONAL, position: [0, 0.58, 0.5, 0.42] },
         { sliceType: SAGITTAL, position: [0.5, 0.58, 0.5, 0.42] }]);
    this.nv.drawScene();
  }

  window(name) {
    const scan = this.nv.volumes[0];
    [scan.cal_min, scan.cal_max] = WINDOWS[name];
    this.nv.updateGLVolume();
  }

  // Relative position in the scan, 0 to 1 along R, A, S, in NiiVue's convention.
  position() { return [...this.nv.scene.crosshairPos]; }

  moveTo(axis, share) {
    this.nv.scene.crosshairPos[axis] = share;
    this.#redraw();
  }

  goTo(mm) {
    this.nv.scene.crosshairPos = this.nv.mm2frac([mm[0], mm[1], mm[2], 1]);
    this.#redraw();
  }

  #redraw() {
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  async overlay(url) {
    this.clear();
    await this.nv.addVolumeFromUrl({
      url, name: "saliency.nii", colormap: "warm", opacity: this.strength, cal_min: 255 * FLOOR, cal_max: 255,
    });
  }

  clear() {
    while (this.nv.volumes.length > 1) this.nv.removeVolume(this.nv.volumes[1]);
  }

  opacity(share) {
    this.strength = share;
    if (this.nv.volumes.length > 1) this.nv.setOpacity(1, share);
  }

  close() {
    this.watching?.disconnect();
    if (!this.nv) return;
    while (this.nv.volumes.length) this.nv.removeVolume(this.nv.volumes[0]);
  }
}
